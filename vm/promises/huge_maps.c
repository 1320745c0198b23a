// SPDX-License-Identifier: GPL-2.0
/*
 * Promise: a mapping of a buffer has huge pages where the buffer has them, and needs no page table
 * there: wherever mmap() puts it, and with any offset. What is done with a part of a huge page does not
 * harm the rest; and a process that wants no huge pages sees the same memory.
 *
 * How a user would notice: a program that goes through a large buffer pays for a page fault, a TLB
 * miss and 4 KiB of page tables in every 2 MiB; an emulator whose guest's memory it is pays twice.
 *
 * How it is looked for: VmPTE in /proc/self/status is what page tables take, ru_minflt how many page
 * faults there were.
 *
 * VM: MEM=2048 SMP=2
 */

#include "guest.h"

#include <pthread.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/uio.h>

#define HUGES 16
#define SIZE (HUGES * HUGE)
#define PAGES (SIZE / PAGE)
#define TABLE 4			/* KiB, of a page table: for 2 MiB */
#define FEW (4 * TABLE)		/* for what is not a whole huge page, and tables of tables */

static struct {
	const struct kind *kind;
	struct books before;
	int memfd, buffer;
	char *mem;			/* the memfd's view */
} t;

FIXTURE(huge_maps) {
};

FIXTURE_VARIANT(huge_maps) {
	const struct kind *kind;
};

FIXTURE_VARIANT_ADD(huge_maps, shmem_thp) { .kind = &shmem_thp };

FIXTURE_VARIANT_ADD(huge_maps, hugetlb) { .kind = &hugetlb };

/* Has all of a mapping mapped, and returns how many KiB of page tables that took. */
static long touch(const volatile char *map, size_t size)
{
	long before = value_of("/proc/self/status", "VmPTE");

	for (size_t at = 0; at < size; at += PAGE)
		(void)map[at];
	return value_of("/proc/self/status", "VmPTE") - before;
}

static long faults(void)
{
	struct rusage usage;

	return getrusage(RUSAGE_SELF, &usage) ? -1 : usage.ru_minflt;
}

/* A mapping of the buffer, where the kernel puts it. NULL: there is none. */
static char *map_part(size_t offset, size_t size, int prot)
{
	char *map = mmap(NULL, size, prot, MAP_SHARED, t.buffer, offset);

	return map == MAP_FAILED ? NULL : map;
}

FIXTURE_SETUP(huge_maps)
{
	char *map;
	long tables;

	t.kind = variant->kind;
	t.before = read_books();
	t.memfd = new_memfd(t.kind, SIZE);
	ASSERT_LE(0, t.memfd);
	t.mem = map_fd(t.memfd, SIZE, PROT_READ | PROT_WRITE);
	ASSERT_NE(NULL, t.mem);
	fill(t.mem, 0, PAGES, 1000);
	t.buffer = create(t.memfd, 0, SIZE);
	ASSERT_LE(0, t.buffer);
	map = map_buffer(t.kind, t.buffer, SIZE, PROT_READ);
	ASSERT_NE(NULL, map);
	tables = touch(map, SIZE);
	munmap(map, SIZE);
	if (tables >= HUGES * TABLE)
		SKIP(LEAVE_SETUP, "Needs: huge_maps");
}

FIXTURE_TEARDOWN(huge_maps)
{
	munmap(t.mem, SIZE);
	close(t.buffer);
	close(t.memfd);
	EXPECT_SAME_BOOKS(t.before);
	write_file(THP_SETTING, "never");
}

TEST_F(huge_maps, wherever_mmap_puts_it)
{
	for (size_t skip = 0; skip < 4; skip++) {
		/* Something in the way moves the next one by a page. */
		char *way = mmap(NULL, (skip + 1) * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		char *map = map_part(0, SIZE, PROT_READ | PROT_WRITE);

		long before = faults();

		ASSERT_NE(NULL, map);
		EXPECT_GE(FEW, touch(map, SIZE));
		EXPECT_GE(HUGES + FEW, faults() - before);
		EXPECT_EQ(0, wrong(map, 0, PAGES, 1000 + skip));
		fill(map, 0, PAGES, 1001 + skip);
		EXPECT_EQ(0, wrong(t.mem, 0, PAGES, 1001 + skip));
		munmap(map, SIZE);
		munmap(way, (skip + 1) * PAGE);
	}
}

TEST_F(huge_maps, with_any_offset)
{
	static const size_t offsets[] = { 1, 511, 512, 700 };

	for (size_t i = 0; i < sizeof(offsets) / sizeof(*offsets); i++) {
		size_t first = offsets[i], n = PAGES - 3 - first;
		char *map = map_part(first * PAGE, n * PAGE, PROT_READ);

		ASSERT_NE(NULL, map);
		EXPECT_GE(FEW, touch(map, n * PAGE));
		EXPECT_EQ(0, wrong(map, first, n, 1000));
		munmap(map, n * PAGE);
	}
}

/* Its memory is not aligned as a huge page has to be, anywhere. */
TEST_F(huge_maps, of_a_buffer_that_begins_within_a_huge_page)
{
	size_t n = PAGES - 1;
	char *map;

	close(t.buffer);
	t.buffer = create(t.memfd, PAGE, n * PAGE);
	ASSERT_LE(0, t.buffer);
	map = map_part(0, n * PAGE, PROT_READ | PROT_WRITE);
	ASSERT_NE(NULL, map);
	EXPECT_EQ(0, wrong(map, 1, n, 1000));
	fill(map, 1, n, 1001);
	EXPECT_EQ(0, wrong(t.mem + PAGE, 1, n, 1001));
	munmap(map, n * PAGE);
}

TEST_F(huge_maps, part_is_unmapped)
{
	size_t gone = 3 * HUGE / PAGE + 100;	/* a page */
	char *map = map_part(0, SIZE, PROT_READ | PROT_WRITE);

	ASSERT_NE(NULL, map);
	touch(map, SIZE);
	munmap(map + gone * PAGE, PAGE);
	EXPECT_EQ(PFN_NONE, pfn_of(map + gone * PAGE));
	EXPECT_EQ(0, wrong(map, 0, gone, 1000));
	EXPECT_EQ(0, wrong(map + (gone + 1) * PAGE, gone + 1, PAGES - gone - 1, 1000));
	fill(map, 0, gone, 1001);
	EXPECT_EQ(0, wrong(t.mem, 0, gone, 1001));
	munmap(map, SIZE);
}

/* Does a write to the page kill who does it? */
static bool write_is_refused(char *at)
{
	int status;
	pid_t pid = fork();

	if (!pid) {
		signal(SIGSEGV, SIG_DFL);
		*(volatile char *)at = *at;
		_exit(0);
	}
	return pid > 0 && waitpid(pid, &status, 0) == pid && WIFSIGNALED(status) &&
	       WTERMSIG(status) == SIGSEGV;
}

TEST_F(huge_maps, part_is_protected)
{
	size_t first = 5 * HUGE / PAGE + 7, n = 600;	/* beyond a huge page */
	char *map = map_part(0, SIZE, PROT_READ | PROT_WRITE);

	ASSERT_NE(NULL, map);
	touch(map, SIZE);
	ASSERT_EQ(0, mprotect(map + first * PAGE, n * PAGE, PROT_READ));
	EXPECT_TRUE(write_is_refused(map + first * PAGE));
	EXPECT_TRUE(write_is_refused(map + (first + n - 1) * PAGE));
	EXPECT_FALSE(write_is_refused(map + (first - 1) * PAGE));
	EXPECT_FALSE(write_is_refused(map + (first + n) * PAGE));
	EXPECT_EQ(0, wrong(map, 0, PAGES, 1000));
	ASSERT_EQ(0, mprotect(map + first * PAGE, n * PAGE, PROT_READ | PROT_WRITE));
	fill(map, 0, PAGES, 1001);
	EXPECT_EQ(0, wrong(t.mem, 0, PAGES, 1001));
	munmap(map, SIZE);
}

/* What is mapped for reading becomes writable, huge pages and all. */
TEST_F(huge_maps, becomes_writable)
{
	char *map = map_part(0, SIZE, PROT_READ);

	ASSERT_NE(NULL, map);
	touch(map, SIZE);
	EXPECT_TRUE(write_is_refused(map + HUGE));
	ASSERT_EQ(0, mprotect(map, SIZE, PROT_READ | PROT_WRITE));
	EXPECT_GE(FEW, touch(map, SIZE));
	fill(map, 0, PAGES, 1001);
	EXPECT_EQ(0, wrong(t.mem, 0, PAGES, 1001));
	munmap(map, SIZE);
}

TEST_F(huge_maps, is_moved)
{
	size_t room = SIZE + 2 * HUGE;
	char *at = mmap(NULL, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char *map = map_part(0, SIZE, PROT_READ | PROT_WRITE);

	ASSERT_NE(MAP_FAILED, at);
	ASSERT_NE(NULL, map);
	touch(map, SIZE);
	/* To where huge pages can be, to where they cannot, and back. */
	at = (char *)(((uintptr_t)at + HUGE - 1) & ~(HUGE - 1));
	for (size_t skip = 0; skip < 2; skip++) {
		char *to = at + skip * PAGE;
		char *away = mremap(map, SIZE, SIZE, MREMAP_MAYMOVE | MREMAP_FIXED, to);

		ASSERT_EQ(to, away);
		EXPECT_EQ(0, wrong(away, 0, PAGES, 1000 + skip));
		fill(away, 0, PAGES, 1001 + skip);
		EXPECT_EQ(0, wrong(t.mem, 0, PAGES, 1001 + skip));
		ASSERT_EQ(map, mremap(away, SIZE, SIZE, MREMAP_MAYMOVE | MREMAP_FIXED, map));
		EXPECT_EQ(0, wrong(map, 0, PAGES, 1001 + skip));
	}
	munmap(map, SIZE);
	munmap(at, SIZE + HUGE);
}

TEST_F(huge_maps, is_inherited)
{
	char *map = map_part(0, SIZE, PROT_READ | PROT_WRITE);
	int status;
	pid_t pid;

	ASSERT_NE(NULL, map);
	touch(map, SIZE);
	pid = fork();
	ASSERT_LE(0, pid);
	if (!pid) {
		bool bad = wrong(map, 0, PAGES, 1000);

		fill(map, 0, PAGES, 1001);
		_exit(bad);
	}
	ASSERT_EQ(pid, waitpid(pid, &status, 0));
	EXPECT_EQ(0, status);
	EXPECT_EQ(0, wrong(map, 0, PAGES, 1001));
	EXPECT_EQ(0, wrong(t.mem, 0, PAGES, 1001));
	munmap(map, SIZE);
}

/* The kernel may not read memory that is mapped as page frames; it must not do so by a huge page. */
TEST_F(huge_maps, is_not_for_the_kernel)
{
	char *map = map_part(0, SIZE, PROT_READ | PROT_WRITE);
	int fds[2];
	struct iovec iov;

	ASSERT_NE(NULL, map);
	touch(map, SIZE);
	ASSERT_EQ(0, pipe2(fds, O_CLOEXEC));
	iov = (struct iovec) { map + HUGE, PAGE };
	EXPECT_EQ(-1, vmsplice(fds[1], &iov, 1, 0));
	EXPECT_EQ(EFAULT, errno);
	close(fds[0]);
	close(fds[1]);
	munmap(map, SIZE);
}

/* KVM, too, maps a huge page where the host does. */
TEST_F(huge_maps, is_memory_of_a_guest)
{
	char *map = map_part(0, SIZE, PROT_READ | PROT_WRITE);
	long huge = 0;

	ASSERT_NE(NULL, map);
	memcpy(t.mem + CODE, increment, sizeof(increment));
	t.mem[INPUT] = 41;
	EXPECT_EQ(42, run_guest_in(_metadata, map, SIZE, 0, &huge));
	EXPECT_EQ(42, t.mem[OUTPUT]);
	EXPECT_LT(0, huge);
	munmap(map, SIZE);
}

/* One fault then maps what a page table holds, as for a buffer without huge pages. */
TEST_F(huge_maps, process_that_wants_none)
{
	long before;
	char *map;

	ASSERT_EQ(0, prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0));
	map = map_part(0, SIZE, PROT_READ | PROT_WRITE);
	ASSERT_NE(NULL, map);
	before = faults();
	EXPECT_LE(HUGES * TABLE, touch(map, SIZE));
	EXPECT_GE(2 * HUGES, faults() - before);
	EXPECT_EQ(0, wrong(map, 0, PAGES, 1000));
	fill(map, 0, PAGES, 1001);
	EXPECT_EQ(0, wrong(t.mem, 0, PAGES, 1001));
	ASSERT_EQ(0, prctl(PR_SET_THP_DISABLE, 0, 0, 0, 0));
	EXPECT_EQ(0, wrong(map, 0, PAGES, 1001));
	munmap(map, SIZE);
}

/*
 * One thread maps a page by a huge page, another one by a page table, as the process does not want huge
 * pages any more: whoever comes first, both see the memory, and the kernel has nothing to say.
 */

#define ROUNDS 300		/* and up to ten times as many, until both came first once */

static pthread_barrier_t begin, end;
static bool over;
static char *volatile at_once;

static void *touch_in_turn(void *who)
{
	for (pthread_barrier_wait(&begin); !over; pthread_barrier_wait(&begin)) {
		(*(volatile __u64 *)(at_once + HUGE + (long)who * PAGE + 64))++;
		pthread_barrier_wait(&end);
	}
	return NULL;
}

TEST_F(huge_maps, wanted_and_not_at_once)
{
	const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
	const size_t room = 4 * HUGE, part = 2 * HUGE;
	char *at = mmap(NULL, 2 * room, PROT_READ | PROT_WRITE, flags, -1, 0);
	int huge = 0, small = 0;
	pthread_t threads[2];

	ASSERT_NE(MAP_FAILED, at);
	at = (char *)(((uintptr_t)at + room - 1) & ~(room - 1));
	/* A neighbour keeps the table that the page tables and huge pages are in. */
	at[3 * HUGE] = 1;
	pthread_barrier_init(&begin, NULL, 3);
	pthread_barrier_init(&end, NULL, 3);
	for (long i = 0; i < 2; i++)
		ASSERT_EQ(0, pthread_create(&threads[i], NULL, touch_in_turn, (void *)i));
	for (int i = 0; i < ROUNDS || ((!huge || !small) && i < 10 * ROUNDS); i++) {
		long before = value_of("/proc/self/status", "VmPTE");

		at_once = mmap(at, part, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, t.buffer, 0);
		EXPECT_EQ(at, at_once);
		pthread_barrier_wait(&begin);
		prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0);
		pthread_barrier_wait(&end);
		if (value_of("/proc/self/status", "VmPTE") > before)
			small++;
		else
			huge++;
		EXPECT_EQ(0, wrong(at, 0, part / PAGE, 1000));
		EXPECT_EQ(at, mmap(at, part, PROT_NONE, flags | MAP_FIXED, -1, 0));
		prctl(PR_SET_THP_DISABLE, 0, 0, 0, 0);
	}
	over = true;
	pthread_barrier_wait(&begin);
	for (int i = 0; i < 2; i++)
		pthread_join(threads[i], NULL);
	TH_LOG("%d times a huge page, %d times a page table", huge, small);
	EXPECT_LT(0, huge);
	EXPECT_LT(0, small);
}

TEST_HARNESS_MAIN
