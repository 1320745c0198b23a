// SPDX-License-Identifier: GPL-2.0
/*
 * Promise: memory that was swapped out comes back into a buffer as it was; memory that is in a
 * buffer stays where it is, whatever reclaim and compaction want; and memory that was in a buffer
 * can be swapped again without losing what was written through it. A create that fails for want
 * of memory says so with a documented errno and leaves nothing behind.
 *
 * Who is affected otherwise: whoever makes buffers on a machine that runs out of memory. Frames
 * turn black, or show another program's pages, and only under load.
 *
 * How it is looked for: the memfd is pushed out by MADV_PAGEOUT, page by page where a part is
 * meant to stay, and that it is in swap is seen in the file's own counters and in mincore().
 * Swap is zram. Then every page has its stamp compared, through both views.
 *
 * VM: MEM=1024 SMP=2 APPEND="movablecore=256M"
 */

#include "promise.h"

#define CGROUP "/sys/fs/cgroup/"
#define SWAPPED_IN "/sys/kernel/mm/transparent_hugepage/hugepages-2048kB/stats/swpin"
#define RECLAIMED CGROUP "reclaimed/"

static struct {
	const struct kind *kind;
	struct books before;
	size_t size, pages;
	int memfd;
	char *mem;
} t;

FIXTURE(swap) {
};

FIXTURE_VARIANT(swap) {
	const struct kind *kind;
};

FIXTURE_VARIANT_ADD(swap, shmem) { .kind = &shmem };

FIXTURE_VARIANT_ADD(swap, shmem_thp) { .kind = &shmem_thp };

FIXTURE_SETUP(swap)
{
	cpu_set_t here;

	/* A page that another CPU has yet to put on a list of the LRU cannot be reclaimed. */
	CPU_ZERO(&here);
	CPU_SET(0, &here);
	sched_setaffinity(0, sizeof(here), &here);

	t.kind = variant->kind;
	t.size = 8 * MIB;
	t.pages = t.size / PAGE;
	t.before = read_books();
	ASSERT_LT((long)(4 * t.size / KIB), value_of("/proc/meminfo", "SwapFree"));
	t.memfd = new_memfd(t.kind, t.size);
	ASSERT_GE(t.memfd, 0);
	t.mem = map_fd(t.memfd, t.size, PROT_READ | PROT_WRITE);
	ASSERT_NE(NULL, t.mem);
	fill(t.mem, 0, t.pages, 1000);
}

FIXTURE_TEARDOWN(swap)
{
	if (t.mem)
		munmap(t.mem, t.size);
	close(t.memfd);
	EXPECT_SAME_BOOKS(t.before);
	write_file(THP_SETTING, "never");
}

/* How many pages of the range are in memory. Those in the swap cache are, too. */
static long resident(const char *at, size_t size)
{
	unsigned char in[64 * MIB / PAGE];
	long n = 0;

	if (mincore((void *)at, size, in))
		return -1;
	for (size_t i = 0; i < size / PAGE; i++)
		n += in[i] & 1;
	return n;
}

/* Takes a range out of memory, in some tries; returns how many of its pages stay. */
static long push_out(char *at, size_t size)
{
	long stay = resident(at, size);

	for (int tries = 0; stay > 0 && tries < 50; tries++) {
		/* Only what is mapped is pushed out, so map again what stayed. */
		if (tries)
			for (size_t i = 0; i < size; i += PAGE)
				if (resident(at + i, PAGE))
					(void)*(volatile char *)(at + i);
		madvise(at, size, MADV_PAGEOUT);
		stay = resident(at, size);
	}
	return stay;
}

static long swapped_kb(void)
{
	return value_of("/proc/meminfo", "SwapTotal") - value_of("/proc/meminfo", "SwapFree");
}

static char *map_whole(struct __test_metadata *_metadata, int buffer)
{
	char *map;

	ASSERT_GE(buffer, 0);
	map = map_buffer(t.kind, buffer, t.size, PROT_READ | PROT_WRITE);
	ASSERT_NE(NULL, map);
	return map;
}

static void check_one_memory(struct __test_metadata *_metadata, int buffer)
{
	char *map = map_whole(_metadata, buffer);

	EXPECT_EQ(0, wrong(map, 0, t.pages, 1000));
	EXPECT_EQ(0, wrong(t.mem, 0, t.pages, 1000));
	fill(map, 0, t.pages, 1001);
	EXPECT_EQ(0, wrong(t.mem, 0, t.pages, 1001));
	fill(t.mem, 0, t.pages, 1002);
	EXPECT_EQ(0, wrong(map, 0, t.pages, 1002));
	munmap(map, t.size);
}

/* All of it is in swap, and is read back: a hole would come back as zeros. */
TEST_F(swap, create_reads_back)
{
	long used = swapped_kb();
	int buffer;

	EXPECT_EQ(0, push_out(t.mem, t.size));
	EXPECT_LE((long)(t.size / KIB), swapped_kb() - used);
	buffer = create(t.memfd, 0, t.size);
	EXPECT_EQ((long)t.pages, resident(t.mem, t.size));
	check_one_memory(_metadata, buffer);
	close(buffer);
}

/* Of huge pages, this splits those that it takes a part of. */
TEST_F(swap, create_reads_back_a_part)
{
	long out = 0;
	int buffer;

	srandom(20230611);
	for (size_t at = 0; at < t.pages;) {
		size_t n = 1 + random() % 200;

		if (n > t.pages - at)
			n = t.pages - at;
		if (random() % 2) {
			EXPECT_EQ(0, push_out(t.mem + at * PAGE, n * PAGE));
			out += n;
		}
		at += n;
	}
	EXPECT_LT(0, out);
	EXPECT_LT(out, (long)t.pages);
	buffer = create(t.memfd, 0, t.size);
	check_one_memory(_metadata, buffer);
	close(buffer);
	TH_LOG("%ld of %zu pages came from swap", out, t.pages);
}

/* A buffer of a part: the rest stays in swap, on both sides of it. */
TEST_F(swap, create_reads_back_no_more)
{
	size_t first = 1000, n = 30, folio = t.kind->page / PAGE, back = n;
	int buffer;

	EXPECT_EQ(0, push_out(t.mem, t.size));
	/* Swap is read a few pages at a time. */
	write_number("/proc/sys/vm/page-cluster", 0);
	buffer = create(t.memfd, first * PAGE, n * PAGE);
	write_number("/proc/sys/vm/page-cluster", 3);
	ASSERT_GE(buffer, 0);
	/* Kernels that read back a huge page as one count how often they do. */
	if (!access(SWAPPED_IN, F_OK))
		back = ((first + n - 1) / folio - first / folio + 1) * folio;
	EXPECT_EQ((long)back, resident(t.mem, t.size));
	EXPECT_EQ(0, wrong(t.mem + first * PAGE, first, n, 1000));
	EXPECT_EQ(0, wrong(t.mem, 0, t.pages, 1000));
	close(buffer);
}

/* What is pinned keeps its place, and its content. */
static void check_stays(struct __test_metadata *_metadata, void (*reclaim)(void))
{
	static __u64 before[8 * MIB / PAGE], after[8 * MIB / PAGE];
	int buffer = create(t.memfd, 0, t.size);
	char *map = map_whole(_metadata, buffer);

	EXPECT_EQ(0, wrong(t.mem, 0, t.pages, 1000));
	ASSERT_TRUE(read_pfns(t.mem, t.pages, before));
	reclaim();
	EXPECT_EQ(0, wrong(map, 0, t.pages, 1000));
	EXPECT_EQ(0, wrong(t.mem, 0, t.pages, 1000));
	ASSERT_TRUE(read_pfns(t.mem, t.pages, after));
	EXPECT_EQ(0, memcmp(before, after, sizeof(before)));
	fill(map, 0, t.pages, 1001);
	EXPECT_EQ(0, wrong(t.mem, 0, t.pages, 1001));
	munmap(map, t.size);
	close(buffer);
}

static void page_out_and_compact(void)
{
	for (int i = 0; i < 4; i++) {
		madvise(t.mem, t.size, MADV_PAGEOUT);
		write_number("/proc/sys/vm/compact_memory", 1);
	}
}

TEST_F(swap, pinned_memory_stays)
{
	check_stays(_metadata, page_out_and_compact);
}

/*
 * A child takes more memory than there is, a part at a time, so that reclaim looks everywhere. It
 * stops when swap has taken enough: the OOM killer is not what this is about.
 */
static void hog_memory(void)
{
	long limit = swapped_kb() + 96 * KIB;
	int status;
	pid_t pid = fork();

	if (!pid) {
		write_file("/proc/self/oom_score_adj", "1000");
		for (int i = 0; i < 1024 && swapped_kb() < limit; i++) {
			char *at = mmap(NULL, 8 * MIB, PROT_READ | PROT_WRITE,
					MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

			for (size_t page = 0; at != MAP_FAILED && page < 8 * MIB; page += PAGE)
				*(size_t *)(at + page) = page + i;
		}
		_exit(swapped_kb() < limit);
	}
	waitpid(pid, &status, 0);
	if (status)
		printf("# the hog ended with status %#x\n", status);
}

TEST_F(swap, pinned_memory_stays_when_memory_is_short)
{
	long stolen = value_of("/proc/vmstat", "pswpout ");

	check_stays(_metadata, hog_memory);
	stolen = value_of("/proc/vmstat", "pswpout ") - stolen;
	EXPECT_LT(4096, stolen);
	TH_LOG("%ld pages were swapped out meanwhile", stolen);
}

static void reclaim_cgroup(void)
{
	for (int i = 0; i < 8; i++) {
		/* Reclaim goes by counters which are brought up to date every two seconds, or here. */
		value_of(RECLAIMED "memory.stat", "shmem ");
		write_file(RECLAIMED "memory.reclaim", "64M");
	}
}

/* memory.reclaim of the cgroup that has the memory. */
TEST_F(swap, pinned_memory_stays_when_its_cgroup_is_reclaimed)
{
	write_file(CGROUP "cgroup.subtree_control", "+memory");
	ASSERT_EQ(0, mkdir(RECLAIMED, 0755));
	ASSERT_TRUE(write_number(RECLAIMED "cgroup.procs", 0));
	munmap(t.mem, t.size);
	close(t.memfd);
	t.memfd = new_memfd(t.kind, t.size);
	t.mem = map_fd(t.memfd, t.size, PROT_READ | PROT_WRITE);
	fill(t.mem, 0, t.pages, 1000);
	EXPECT_LE((long)t.size, value_of(RECLAIMED "memory.stat", "shmem "));
	check_stays(_metadata, reclaim_cgroup);
	/* And it is what would have taken it. */
	reclaim_cgroup();
	EXPECT_GT((long)t.pages / 4, resident(t.mem, t.size));
	EXPECT_EQ(0, wrong(t.mem, 0, t.pages, 1001));
	write_number(CGROUP "cgroup.procs", 0);
	munmap(t.mem, t.size);
	t.mem = NULL;
	close(t.memfd);
	t.memfd = open("/dev/null", O_RDONLY | O_CLOEXEC);
	for (int tries = 0; rmdir(RECLAIMED) && tries < 200; tries++)
		usleep(10000);
	write_file(CGROUP "cgroup.subtree_control", "-memory");
}

/*
 * Pages of a hole that was only read are clean, and reclaim drops them without a write, swap or
 * not. What is written through the buffer since has to make them dirty.
 */
TEST_F(swap, what_was_written_through_the_buffer_survives)
{
	int buffer;
	char *map;

	munmap(t.mem, t.size);
	close(t.memfd);
	t.memfd = new_memfd(t.kind, t.size);
	/* Nobody writes to them in any other way. */
	t.mem = map_fd(t.memfd, t.size, PROT_READ);
	ASSERT_NE(NULL, t.mem);
	for (size_t i = 0; i < t.pages; i++)
		EXPECT_EQ(0, t.mem[i * PAGE]);
	buffer = create(t.memfd, 0, t.size);
	map = map_whole(_metadata, buffer);
	for (unsigned int who = 2000; who < 2003; who++) {
		fill(map, 0, t.pages, who);
		EXPECT_EQ(0, wrong(t.mem, 0, t.pages, who));
	}
	munmap(map, t.size);
	close(buffer);
	EXPECT_EQ(0, push_out(t.mem, t.size));
	EXPECT_EQ(0, wrong(t.mem, 0, t.pages, 2002));
}

/* Not once but for as long as the memfd lives. */
TEST_F(swap, in_and_out)
{
	int buffer;
	char *map;

	for (unsigned int who = 3000; who < 3004; who++) {
		buffer = create(t.memfd, 0, t.size);
		map = map_whole(_metadata, buffer);
		EXPECT_EQ(0, wrong(t.mem, 0, t.pages, who == 3000 ? 1000 : who - 1));
		fill(map, 0, t.pages, who);
		munmap(map, t.size);
		close(buffer);
		EXPECT_EQ(0, push_out(t.mem, t.size));
	}
	EXPECT_EQ(0, wrong(t.mem, 0, t.pages, 3003));
}

/*
 * The memory of a cgroup is all in swap. Its limit has room for half of it, and swap takes no more:
 * what is read back, and pinned, cannot be pushed out again. So a create fails, or its task is
 * killed, and the memory is as before.
 */
#define FULL CGROUP "full/"

static void __attribute__((noreturn)) create_in_full_cgroup(int report)
{
	int ret;

	if (!write_number(FULL "cgroup.procs", 0))
		_exit(1);
	fill(t.mem, 0, t.pages, 1000);
	if (push_out(t.mem, t.size))
		_exit(2);
	if (!write_number(FULL "memory.swap.max", 0) ||
	    !write_number(FULL "memory.max", t.size / 2))
		_exit(3);
	ret = create(t.memfd, 0, t.size);
	_exit(write(report, &ret, sizeof(ret)) == sizeof(ret) ? 0 : 4);
}

/* The books are those of before, when the file was in swap or nowhere. */
static void check_refused(struct __test_metadata *_metadata, int report, int status)
{
	int ret = 0;

	if (WIFSIGNALED(status)) {
		EXPECT_EQ(SIGKILL, WTERMSIG(status));
		TH_LOG("the task was killed");
		return;
	}
	EXPECT_EQ(0, status);
	EXPECT_EQ((ssize_t)sizeof(ret), read(report, &ret, sizeof(ret)));
	EXPECT_EQ(-ENOMEM, ret);
}

TEST_F(swap, create_with_nowhere_to_swap_to)
{
	long before = pins();
	int report[2], status;
	pid_t pid;

	munmap(t.mem, t.size);
	close(t.memfd);
	t.memfd = new_memfd(t.kind, t.size);
	t.mem = map_fd(t.memfd, t.size, PROT_READ | PROT_WRITE);
	ASSERT_NE(NULL, t.mem);
	write_file(CGROUP "cgroup.subtree_control", "+memory");
	ASSERT_EQ(0, mkdir(FULL, 0755));
	ASSERT_EQ(0, pipe2(report, O_CLOEXEC));
	quiet_kernel();
	pid = fork();
	ASSERT_GE(pid, 0);
	if (!pid)
		create_in_full_cgroup(report[1]);
	waitpid(pid, &status, 0);
	close(report[1]);
	EXPECT_EQ(0, complaints());
	check_refused(_metadata, report[0], status);
	close(report[0]);
	EXPECT_EQ(before, pins());
	EXPECT_TRUE(write_file(FULL "memory.max", "max"));
	EXPECT_EQ(0, wrong(t.mem, 0, t.pages, 1000));
	/* And now it fits. */
	status = create(t.memfd, 0, t.size);
	EXPECT_LE(0, status);
	close(status);
	munmap(t.mem, t.size);
	t.mem = NULL;
	close(t.memfd);
	t.memfd = open("/dev/null", O_RDONLY | O_CLOEXEC);
	for (int tries = 0; rmdir(FULL) && tries < 200; tries++)
		usleep(10000);
	write_file(CGROUP "cgroup.subtree_control", "-memory");
}

TEST_HARNESS_MAIN
