# SPDX-License-Identifier: GPL-2.0
# The one entry point. Each target is a script in tools/, demo/ or tests/.

KERNEL ?= patched
HUGETLB ?= on
export BASE VERSION HUGETLB CONFIG

help:
	@sed -n 's/^#:: //p' Makefile

#:: make tree     linux/BASE: the base with one commit per patch (VERSION= chooses its version)
#:: make series   write the commits of linux/BASE back to patches/BASE
#:: make build    build the kernel into build/BASE/$KERNEL
#:: make shell    boot it to a prompt
#:: make demo     QEMU's virtio-gpu on it, its framebuffer in a udmabuf (HUGETLB=off: on shmem)
#:: make test     what must hold before a change lands
#:: make test-all the same, and what takes hours: stock, debug, odd and broken kernels
#:: make bench    compare what udmabuf costs on all bases, stock and patched, in docs/bench.md
#:: make dist     the series, cover letter and documentation as one tarball in out/BASE/dist
#:: make deb      Debian packages in out/BASE/deb, configured as your kernel is (or CONFIG=FILE)
#:: make clean    remove build/ and out/; linux/ too, unless it holds work
#::
#:: BASE= says which of patches/bases they are about, 6.1 by default; bench and clean have no such
#:: choice. make test and make test-all are about all, or those named: BASE='6.1 7.3'.
#:: KERNEL=patched (default), KERNEL=stock (the base without the series) or KERNEL=debug
#:: (with everything that kernels check about themselves) goes with build and shell;
#:: KERNEL=stock with demo too.

tree: deps
	@tools/tree

series:
	@tools/series

build: tree
	@tools/build $(KERNEL)

shell: build
	@tools/boot $(KERNEL) out/$${BASE:-6.1}/shell

demo: build
	@demo/run $(KERNEL)

test:
	@tests/run

test-all:
	@HUGETLB='off on' tests/run shell series same dist apply patches selftest promises gup examples demo \
		stock stock-promises gigantic own gup-all docs debug mutants odd deb; rc=$$?; \
	tests/table && exit $$rc

bench: tree
	@tools/deps bench
	@tools/bench

dist: tree
	@tools/dist

deb: tree
	@tools/deb

clean:
	@tools/clean

deps:
	@tools/deps

.PHONY: help tree series build shell demo test test-all bench dist deb clean deps
