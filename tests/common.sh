# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# Sourced by the suites.
. "$(dirname "${BASH_SOURCE[0]}")/../tools/common.sh"

work=$build/tests
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
	("$@") >"$work/check-$me.log" 2>&1 || rc=$?
	result $rc "$name" "$work/check-$me.log"
}

have_patches()
{
	[ -n "$(list_patches)" ] || {
		echo "not ok patches/$base holds no patch"
		exit 1
	}
}

# ktap_results RC FILE: what a kselftest program said, as one line per case, "ok NAME", "not ok
# NAME" or "ok NAME # SKIP reason", and those of vm/selftest. RC is the status that the machine
# ended with, and FILE.boot what tools/boot said of it. A case during which the machine stopped has
# failed; what the kernel said in its log is a failure of its own, and so is an end before the last
# line of vm/selftest.
ktap_results()
{
	local rc=$1
	# The harness names a skipped case only before its result, in its RUN line.
	awk -v rc="$rc" '
	/^# +RUN / { name = $3; running = 1 }
	/^1\.\.[0-9]+$/ { plan = substr($0, 4) }
	/^(not )?ok [0-9]+ / {
		seen++
		running = 0
		reason = ""
		if (match($0, / # SKIP.*/)) reason = substr($0, RSTART)
		sub("SKIP " name ": ", "SKIP ", reason)
		print ($1 == "not" ? "not ok " : "ok ") name reason
		bad += $1 == "not"
		next
	}
	/^# vm\/selftest is done$/ { done = 1; next }
	/^(not )?ok / { print; bad += $1 == "not" }
	END {
		if (running) print "not ok " name " # the machine stopped"
		if (!plan) print "not ok the program gave no plan: see ktap"
		else if (seen != plan) print "not ok all " plan " cases ran: " seen + 0 " did"
		if (!done) print "not ok the machine came to its end"
		if (rc == 99) print "not ok the-kernel-complained"
		else if (rc && !bad) print "not ok the VM ended with status " rc
	}' "$2"
	[ "$rc" -eq 0 ] || sed 's/^/#   /' "$2.boot"
}

# scratch_tree DIR: a worktree of linux/BASE where nobody works, at any commit. The first time, it is made.
scratch_tree()
{
	git -C "$1" rev-parse -q --verify HEAD >/dev/null 2>&1 || {
		rm -rf "$1"
		git -C "$tree" worktree prune
		git -C "$tree" worktree add -q -f -f --detach "$1" "$tag"
	}
}

# needs WHAT: skips the suite if the series lacks that.
needs()
{
	[[ ,$lacks, != *,$1,* ]] || {
		echo "ok all of it # SKIP Needs: $1"
		exit
	}
}

# allow_needs KERNEL: what a case needs and the kernel lacks makes it skip ("Needs: WHAT"). The
# series may lack what patches/bases says, the base anything.
allow_needs()
{
	local may=$lacks
	[ "$1" != stock ] || may=all
	awk -v may=",$may," '
	match($0, /# SKIP Needs: [^ ]+/) {
		what = substr($0, RSTART + 14, RLENGTH - 14)
		if (may != ",all," && !index(may, "," what ",")) { print "not " $0; next }
	}
	{ print }'
}

# run_program KERNEL OUT PROGRAM: the results of a kselftest program, a path in the checkout, on
# the kernel of build/BASE/KERNEL. ARGS are the program's arguments: of a harness, "-f FIXTURE -v VARIANT"
# leaves only these.
run_program()
{
	local kernel=$1 out=$2 rc=0 args
	rm -rf "$out"
	mkdir -p "$out"
	read -ra args <<<"${ARGS:-}"
	"$top/tools/boot" "$kernel" "$out" "$top/vm/selftest" "$3" "${args[@]}" >"$out/ktap" 2>"$out/ktap.boot" || rc=$?
	ktap_results $rc "$out/ktap" | allow_needs "$kernel"
}

# run_selftest KERNEL: the kselftest of udmabuf that the series carries. With swiotlb=force, the DMA
# API copies what is mapped for a device, as it does on few PCs: a kernel that maps a buffer because
# the CPU accesses it, as stock does, is found out.
run_selftest()
{
	MEM=${MEM:-8192} APPEND=${APPEND-hugepagesz=1G hugepages=3 swiotlb=force} \
		run_program "$1" "$output/selftest-$1" "build/$base/patched/selftests/drivers/dma-buf/udmabuf"
}

# machines PROGRAM: the names of the machines on which a program of vm/promises runs; none, if it
# has but one.
machines()
{
	sed -nE 's/^ \* VM ([a-z]+): .*/\1/p' "$top/vm/promises/$1.c"
}

# program_of CASE: what run_promises has to run to get there.
program_of()
{
	local program=${1%%.*} rest=${1#*.}
	if [ "$program" != selftest ] && machines "$program" | grep -qx "${rest%%.*}"; then
		program+=.${rest%%.*}
	fi
	echo "$program"
}

# run_promises KERNEL [PROGRAM...]: the programs of vm/promises, each on a machine of its own, as
# its line "VM:" describes it. A case is called PROGRAM.CASE. Where lines "VM MACHINE:" say what
# else there is to several machines, it runs on each, and a case is PROGRAM.MACHINE.CASE; with
# PROGRAM.MACHINE, on that one only. Two machines run at a time. Of all programs, the
# largest come first: they take longest.
run_promises()
{
	local kernel=$1 names=("${@:2}") name program all=() runs
	[ ${#names[@]} -gt 0 ] ||
		mapfile -t names < <(find "$top/vm/promises" -name '*.c' -printf '%s %p\n' | sort -rn | cut -d' ' -f2-)
	mkdir -p "$work/promises-$kernel" "$output/promises-$kernel"
	[ ! -e "$build/$kernel/edu/edu.ko" ] ||
		cp "$build/$kernel/edu/edu.ko" "$work/promises-$kernel/"
	for name in "${names[@]}"; do
		name=$(basename "$name" .c)
		program=${name%%.*}
		gcc -O2 -Wall -Wextra -Wno-unused-parameter -pthread -isystem "$build/patched/usr/include" \
			-isystem "$tree/tools/testing/selftests" -I"$tree" \
			-o "$work/promises-$kernel/$program" "$top/vm/promises/$program.c" || {
			echo "not ok $program compiles"
			continue
		}
		mapfile -t runs < <(machines "$program" | sed "s/^/$program./")
		if [ "$name" != "$program" ] || [ ${#runs[@]} -eq 0 ]; then
			runs=("$name")
		fi
		all+=("${runs[@]}")
	done
	# shellcheck disable=SC2016 # that is for the shell which xargs starts
	printf '%s\n' "${all[@]}" | xargs -P 2 -I{} bash -c '. "$1/tests/common.sh"; run_promise "$2" "$3"' \
		promise "$top" "$kernel" {}
}

# run_promise KERNEL PROGRAM[.MACHINE]: one of them, compiled by now. Its results come all at once.
run_promise()
{
	local kernel=$1 run=$2 program=${2%%.*} machine results=$output/promises-$1/$2.results line
	machine=${run#"$program"}
	while read -r line; do
		eval "export $line"
	done < <(sed -nE "s/^ \* VM( ${machine#.})?: //p" "$top/vm/promises/$program.c")
	run_program "$kernel" "$output/promises-$kernel/$run" "build/$base/tests/promises-$kernel/$program" |
		sed -E "s/^((not )?ok )/\1$run./" >"$results"
	flock "$work/promises-$kernel" cat "$results"
}

# judge_promises KERNEL: all programs of vm/promises, where exactly the cases must fail that
# tests/not-kept lists.
judge_promises()
{
	local rc=0
	run_promises "$1" >"$work/promises-$1.all" || rc=$?
	expect_failures promises "$work/promises-$1.all" not-kept
	return $rc
}

# listed_failures SUITE LIST: its patterns in tests/LIST/BASE, one of each that braces stand for, behind
# "always", "chance", or "perhaps": by chance, and in some runs the kernel is dead before it gets there.
listed_failures()
{
	local often pattern
	awk -v suite="$1" '
	/^[^\t#]/ { often = /^by chance, or not reached:/ ? "perhaps" : /^by chance:/ ? "chance" : "always" }
	/^\t/ && $1 == suite { print often, $2 }' "$top/tests/$2/$base" |
		(set -f; while read -r often pattern; do eval "printf '$often %s\n' $pattern"; done)
}

# expect_failures SUITE RESULTS LIST: result lines that say whether the cases failed that are in
# tests/LIST/BASE, and no others did. Of those by chance, some can go well, too. LIST is "fails-on-stock",
# what the base without the series has to fail; or "not-kept", what the series does not keep there
# yet: such a case is not taken for a success.
expect_failures()
{
	[ -e "$top/tests/$3/$base" ] || { cat "$2"; return; }
	awk -v list="$3" '
	FILENAME == ARGV[1] {
		chance[++n] = $1 != "always"
		seen[n] = $1 == "perhaps"
		text[n] = re = $2
		gsub(/\./, "[.]", re)
		gsub(/\*/, ".*", re)
		pattern[n] = "^" re "$"
		next
	}
	{
		failed = $1 == "not"
		name = failed ? $3 : $2
		found = 0
		for (i = 1; i <= n; i++)
			if (name ~ pattern[i]) {
				seen[i] = 1
				if (!found || !chance[i]) found = i
			}
		if (!found || !failed && (/# SKIP/ || chance[found])) print
		else if (!failed) print "not ok " name " is in " list ": it passes"
		else print "ok " name (list == "not-kept" ? " # SKIP " list : " fails on stock")
	}
	END {
		for (i = 1; i <= n; i++)
			if (!seen[i]) print "not ok " text[i] " is in " list ": there is no such case"
	}' <(listed_failures "$1" "$3") "$2"
}
