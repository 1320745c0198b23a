# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# Sourced by the suites.
. "$(dirname "${BASH_SOURCE[0]}")/../tools/common.sh"

work=$top/build/tests
mkdir -p "$work"

# result STATUS NAME [FILE]: one result line; when it failed, FILE tells why.
result()
{
	if [ "$1" -eq 0 ]; then
		echo "ok $2"
	else
		echo "not ok $2"
		[ ! -s "${3:-}" ] || sed 's/^/#   /' "$3" | head -n 40
	fi
}

# check NAME COMMAND...: a result line that says whether the command succeeded.
check()
{
	local name=$1 rc=0
	shift
	("$@") >"$work/check.log" 2>&1 || rc=$?
	result $rc "$name" "$work/check.log"
}

have_patches()
{
	[ -n "$(list_patches)" ] || {
		echo "not ok patches/6.1 holds no patch"
		exit 1
	}
}

# run_selftest NAME: the series' kselftest on the kernel of build/NAME. Prints one line per
# case, "ok NAME", "not ok NAME" or "ok NAME # SKIP reason", and one for the accounting.
run_selftest()
{
	local name=$1 out=$top/out/selftest-$1 rc=0
	rm -rf "$out"
	mkdir -p "$out"
	"$top/tools/boot" "$name" "$out" "$top/vm/selftest" >"$out/ktap" || rc=$?
	# The harness names a skipped case only before its result, in its RUN line.
	awk -v rc=$rc '
	/^# +RUN / { name = $3 }
	/^1\.\.[0-9]+$/ { plan = substr($0, 4) }
	/^(not )?ok [0-9]+ / {
		seen++
		reason = ""
		if (match($0, / # SKIP.*/)) reason = substr($0, RSTART)
		sub("SKIP " name ": ", "SKIP ", reason)
		print ($1 == "not" ? "not ok " : "ok ") name reason
		bad += $1 == "not"
		next
	}
	/^(not )?ok / { print; bad += $1 == "not" }
	END {
		if (!plan) print "not ok the selftest gave no plan: see ktap"
		else if (seen != plan) print "not ok all " plan " cases ran: " seen + 0 " did"
		else if (rc && !bad) print "not ok the VM ended with status " rc
	}' "$out/ktap"
}
