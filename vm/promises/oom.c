// SPDX-License-Identifier: GPL-2.0
/*
 * Promise: nobody is killed for a buffer. A machine can have plenty of movable memory and little
 * else. When that which a buffer may have is used up, the create is refused with ENOMEM: whether
 * memory is to be moved there or a hole to be filled.
 *
 * Who is affected otherwise: everybody else on the machine. The OOM killer takes one task after the
 * other for memory that their end does not bring, and at last who asked.
 *
 * How it is looked for: a memfd is larger than all memory outside of ZONE_MOVABLE, and gets one
 * buffer after the other, until a create fails. A bystander has the memory and the score that the
 * OOM killer looks for first. There is no swap. What is short then, the kernel needs for itself,
 * and may kill for: so all is given back before anybody asks for more.
 *
 * VM: MEM=1536 SMP=2 APPEND="movablecore=1216M" OOM=expected
 */

#include "promise.h"

#include <sys/swap.h>

#define SWAP "/dev/zram0"
#define PART (8 * MIB)
#define SIZE (480 * MIB)
#define PARTS (SIZE / PART)
#define BYSTANDER (32 * MIB)

static struct {
	const struct kind *kind;
	struct books before;
	long kills;
	int memfd, log;
	pid_t bystander;
} t;

/* The OOM killer may take a case, but not its parent, which has the last word. */
static long pool;

static void put_back(void)
{
	write_number(POOL_2M "nr_hugepages", pool);
	if (pool_value(POOL_2M, "nr_hugepages") != pool)
		printf("not ok the pool has its %ld huge pages again\n", pool);
}

static void __attribute__((constructor)) save(void)
{
	pool = pool_value(POOL_2M, "nr_hugepages");
	atexit(put_back);
}

FIXTURE(oom) {
};

FIXTURE_VARIANT(oom) {
	const struct kind *kind;
};

FIXTURE_VARIANT_ADD(oom, shmem) { .kind = &shmem };

FIXTURE_VARIANT_ADD(oom, shmem_thp) { .kind = &shmem_thp };

static long kills(void)
{
	return value_of("/proc/vmstat", "oom_kill ");
}

/* Somebody with memory, who waits, and is the first to be killed. */
static void start_bystander(struct __test_metadata *_metadata)
{
	int ready[2];
	char c = 0;

	ASSERT_EQ(0, pipe2(ready, O_CLOEXEC));
	t.bystander = fork();
	ASSERT_LE(0, t.bystander);
	if (!t.bystander) {
		char *mem = mmap(NULL, BYSTANDER, PROT_READ | PROT_WRITE,
				 MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

		c = mem != MAP_FAILED && write_file("/proc/self/oom_score_adj", "1000");
		if (write(ready[1], &c, 1) == 1)
			pause();
		_exit(0);
	}
	ASSERT_EQ(1, read(ready[0], &c, 1));
	ASSERT_EQ(1, c);
	close(ready[0]);
	close(ready[1]);
}

static bool bystander_lives(void)
{
	return !waitpid(t.bystander, NULL, WNOHANG);
}

FIXTURE_SETUP(oom)
{
	t.kind = variant->kind;
	t.memfd = -1;
	if (zone_movable().start == zone_movable().end)
		SKIP(return, "no ZONE_MOVABLE: boot with movablecore=");
	write_number(POOL_2M "nr_hugepages", 0);
	swapoff(SWAP);
	ASSERT_EQ(0, value_of("/proc/meminfo", "SwapTotal"));
	/* What is run from now on is there, and is not read from the host in want of memory. */
	ASSERT_EQ(0, mlockall(MCL_CURRENT));
	t.before = read_books();
	t.memfd = new_memfd(t.kind, SIZE);
	ASSERT_LE(0, t.memfd);
	start_bystander(_metadata);
	t.log = open("/dev/kmsg", O_RDONLY | O_NONBLOCK | O_CLOEXEC);
	ASSERT_LE(0, t.log);
	lseek(t.log, 0, SEEK_END);
	t.kills = kills();
	ASSERT_LE(0, t.kills);
}

FIXTURE_TEARDOWN(oom)
{
	if (t.bystander > 0) {
		kill(t.bystander, SIGKILL);
		waitpid(t.bystander, NULL, 0);
	}
	close(t.log);
	close(t.memfd);
	munlockall();
	EXPECT_SAME_BOOKS(t.before);
	write_file(THP_SETTING, "never");
	swapon(SWAP, 0);
}

/* Each has a trace, and tells nobody anything that the ENOMEM does not. */
static int allocation_warnings(void)
{
	char record[2048];
	int n = 0;
	ssize_t len;

	while ((len = read(t.log, record, sizeof(record) - 1)) > 0 || errno == EPIPE) {
		if (len < 0)
			continue;
		record[len] = 0;
		if (!strstr(record, "page allocation failure"))
			continue;
		printf("# %s\n", record);
		n++;
	}
	return n;
}

/* Makes buffers of the memfd, until one is refused, and gives all back. */
static void create_until_refused(struct __test_metadata *_metadata)
{
	static int buffers[PARTS];
	int dev = open("/dev/udmabuf", O_RDWR | O_CLOEXEC), made = 0, refused = 0;

	ASSERT_LE(0, dev);
	while (!refused && made < (int)PARTS) {
		buffers[made] = create_at(dev, t.memfd, made * PART, PART);
		if (buffers[made] < 0)
			refused = buffers[made];
		else
			made++;
	}
	for (int i = 0; i < made; i++)
		close(buffers[i]);
	fallocate(t.memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, SIZE);
	close(dev);

	TH_LOG("%d of %d buffers were made", made, (int)PARTS);
	EXPECT_LT(0, made);
	EXPECT_EQ(-ENOMEM, refused);
	EXPECT_TRUE(bystander_lives());
	EXPECT_EQ(t.kills, kills());
	EXPECT_EQ(0, allocation_warnings());
}

/* All of it is in ZONE_MOVABLE, and has to leave. */
TEST_F(oom, movable_memory)
{
	char *mem = map_fd(t.memfd, SIZE, PROT_READ | PROT_WRITE);

	ASSERT_NE(NULL, mem);
	fill(mem, 0, SIZE / PAGE, 1000);
	ASSERT_EQ((long)(PART / PAGE), pages_in(zone_movable(), mem, PART));
	ASSERT_EQ((long)(PART / PAGE), pages_in(zone_movable(), mem + SIZE - PART, PART));
	munmap(mem, SIZE);
	create_until_refused(_metadata);
}

TEST_F(oom, holes)
{
	create_until_refused(_metadata);
}

TEST_HARNESS_MAIN
