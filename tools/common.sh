# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# Sourced by every script here: where things are, and how errors are told.
# An error is one line on stderr, "NAME: what happened: what to do", and status 1.

set -euo pipefail
export LC_ALL=C
# A hook or an outer rebase must not steer the git commands below.
unset GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE MAKEFLAGS MAKELEVEL MFLAGS

# shellcheck disable=SC2034 # used by those who source this file
me=${0##*/}
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

say() { printf '%s\n' "$me: $*" >&2; }
die() { say "$*"; exit 1; }

# shellcheck disable=SC2034
cache=${XDG_CACHE_HOME:-$HOME/.cache}/udmabuf-series

# choose_base BASE: what the scripts have to know about it, see patches/bases. All git trees are
# worktrees of one object store; there, a base is a tag, and its series a branch.
# shellcheck disable=SC2034
choose_base()
{
	base=$1
	read -r _ package suite selftests prefix lacks options < <(grep -E "^${base//./\\.} " "$top/patches/bases") ||
		die "there is no base '$base': choose $(list_bases | paste -sd'|')"
	tree=$top/linux/$base build=$top/build/$base output=$top/out/$base patches=$top/patches/$base
	store=$top/linux/store.git
	tag=base-$base branch=series-$base stamp=$store/series-stamp-$base
}

# list_bases: those that patches/bases has.
list_bases() { awk '/^[0-9]/ { print $1 }' "$top/patches/bases"; }

choose_base "${BASE:-6.1}"

# What the kernel says when something is wrong with it, lockdep and KASAN included.
# shellcheck disable=SC2034
kernel_bug='WARNING: |BUG: |kernel BUG at|Oops|KASAN|UBSAN|KFENCE|Call Trace|general protection|Kernel panic'
kernel_bug+='|possible (recursive|circular|irq lock)|inconsistent lock|suspicious RCU|DEBUG_LOCKS'
kernel_bug+='|Bad (page|rss|swap)|bad (pmd|pud|pgd)|corrupt|INFO: .*(stall|blocked|hung)|refcount_t'
kernel_bug+='|unable to handle|sleeping function|suspected memory leak|Underflow|nobody cared'

case $top in
*[[:space:]:]*) die "the kernel cannot be built under '$top': move the checkout to a path without spaces and colons" ;;
esac

# need_space DIR MIB: stop early, not in the middle of a build.
need_space()
{
	local free
	free=$(df -Pm "$1" | awk 'NR == 2 { print $4 }')
	[ "$free" -ge "$2" ] ||
		die "$1 has $free MiB free and this step needs $2: make room there"
}

# The patches of the series, in order.
list_patches()
{
	[ ! -e "$patches" ] || find "$patches" -maxdepth 1 -name '[0-9]*.patch' | sort
}

patches_hash()
{
	list_patches | xargs -r cat | sha256sum | cut -d' ' -f1
}

# kmake SRC OBJ ARGUMENT...: make for a kernel out of tree, with the compiler that LLVM=1 or
# CROSS_COMPILE=PREFIX among the arguments asks for. With paths relative to the checkout,
# and no time or host in the result, another checkout gets its objects from ccache, which
# takes what each depends on from the compiler instead of preprocessing all once more; the
# prefix map keeps file names in messages short all the same. What -save-temps is for: ccache lets
# such a file alone. It does not see what the .incbin of piggy.S takes in, and gave bzImage the
# payload of another kernel whose compressed size was the same.
kmake()
{
	local src=$1 obj=$2 cc=gcc argument
	shift 2
	for argument; do
		case $argument in
		LLVM=1) cc=clang ;;
		CROSS_COMPILE=*) cc=${argument#*=}gcc ;;
		esac
	done
	env CCACHE_BASEDIR="$top" CCACHE_NOHASHDIR=1 CCACHE_DEPEND=1 LOCALVERSION= \
		KBUILD_BUILD_TIMESTAMP=2022-12-11 KBUILD_BUILD_VERSION=1 \
		KBUILD_BUILD_USER=udmabuf KBUILD_BUILD_HOST=series \
		make -C "$src" O="$obj" CC="ccache $cc" \
		KCFLAGS="-fmacro-prefix-map=$(realpath --relative-to="$obj" "$src")/=" AFLAGS_piggy.o=-save-temps=obj "$@"
}

# configuration FRAGMENT...: what they say together, where a later line for the same option wins, in
# the options that the base has: see patches/bases.
configuration()
{
	local added='' changed
	[ "${1##*/}" != small.config ] ||
		added=$(tr , '\n' <<<"$options" | sed -nE 's/^\+(.+)/CONFIG_\1=y/p')
	changed=$(tr , '\n' <<<"$options" |
		sed -nE 's/^-(.+)/\/CONFIG_\1=\/d/p; s/(.+)=(.+)/s@CONFIG_\1\\b@CONFIG_\2@/p')
	awk '/^(# )?CONFIG_/ { option = $1 == "#" ? $2 : $1; sub("=.*", "", option); line[option] = $0 }
		END { for (option in line) print line[option] }' <(echo "$added") "$@" |
		sed -E "$changed" | sort
}

# build_edu SRC OBJ: the module of vm/edu for the kernel built in OBJ, as OBJ/edu/edu.ko.
build_edu()
{
	mkdir -p "$2/edu"
	cp -u "$top"/vm/edu/* "$2/edu/"
	kmake "$1" "$2" M="$2/edu" modules
}

# Git without the user's settings, where the output must be the same everywhere.
plain_git()
{
	GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_NOSYSTEM=1 git "$@"
}

# apply_series REPO TAG DIR: a new worktree DIR of that tag of REPO, reduced to the files
# that the series touches, with one commit per patch on top. On failure DIR is gone
# again. The commits depend on nothing but the base, the patches and the committer.
apply_series()
{
	local repo=$1 tag=$2 dir=$3 list bad
	mapfile -t list < <(list_patches)
	rm -rf "$dir"
	git -C "$repo" worktree prune
	git -C "$repo" worktree add -q --detach --no-checkout "$dir" "$tag"
	touched_files | git -C "$dir" sparse-checkout set --no-cone --stdin
	git -C "$dir" read-tree -mu HEAD
	[ ${#list[@]} -gt 0 ] || return 0
	if ! git -C "$dir" config user.email >/dev/null; then
		local -x GIT_COMMITTER_NAME=nobody GIT_COMMITTER_EMAIL=nobody@localhost
	fi
	git -C "$dir" -c commit.gpgSign=false am -q --committer-date-is-author-date \
		"${list[@]}" >"$dir.log" 2>&1 || {
		bad=$(git -C "$dir" am --show-current-patch=raw 2>/dev/null |
			sed -n 's/^Subject: //p' | head -1)
		sed 's/^/    /' "$dir.log" >&2
		git -C "$dir" am --abort || true
		git -C "$repo" worktree remove --force "$dir"
		rm -f "$dir.log"
		die "'${bad:-a patch}' does not apply to $(git -C "$repo" log -1 --format=%s "$tag"): refresh it there, or choose another version with VERSION="
	}
	rm -f "$dir.log"
}

# The files that the series touches, as patterns for git sparse-checkout.
touched_files()
{
	echo /Makefile
	list_patches | xargs -r sed -nE 's@^diff --git a/.* b/(.*)@/\1@p' | sort -u
}

# arch_of ARGUMENT...: the directory in arch/ that those arguments of make build for.
arch_of()
{
	local argument arch=x86
	for argument; do
		case $argument in
		ARCH=i386 | ARCH=x86_64) arch=x86 ;;
		ARCH=*) arch=${argument#*=} ;;
		esac
	done
	echo "$arch"
}

# objects_of [ARCH]: the objects of the C files that stdin names, as make knows them on ARCH, or
# x86. What is in virt/ becomes part of an architecture; what is in arch/ belongs to one.
objects_of()
{
	local arch=${1:-x86}
	sed -nE "/^arch\//{/^arch\/$arch\//!d}; s@^virt/@arch/$arch/kvm/../../../virt/@; s@\.c\$@.o@p"
}

# touched_objects [ARCH]: the objects of the kernel that the series touches.
touched_objects()
{
	touched_files | sed -E 's@^/@@; /^(tools|samples)\//d' | objects_of "$@"
}
