// SPDX-License-Identifier: GPL-2.0
/*
 * Promised: what a buffer has pinned is not in ZONE_MOVABLE. It was moved out of there, with its
 * content, while others went on using it; and what had to be allocated was taken from elsewhere.
 *
 * A user who keeps memory in ZONE_MOVABLE to unplug it later would find, if this were not so, that
 * it cannot be unplugged: offlining tries for ever to migrate what a buffer holds.
 *
 * So: count by page frame how much of a memfd is in the zone, before and after a buffer is made;
 * then take every block of the zone that the machine lets go offline at once, and online again,
 * while the buffer is written through and read. Offlining does not end where a page cannot move:
 * a child does it, which is killed once its polls have shown the pages where they were.
 *
 * The kernel itself has some of the memory that becomes ZONE_MOVABLE, allocated before there were
 * zones. The blocks it is in never go offline; which, is found out once, before the first case.
 *
 * VM: MEM=4096 SMP=2 APPEND="movablecore=1G"
 */

#include "moving.h"
#include "trace.h"

#define MEMORY "/sys/devices/system/memory/"
#define MAX_BLOCKS 64
#define POOL_OUTSIDE 96			/* huge pages, while a case on hugetlb runs */
#define POOL_PAGES 112
#define BALLAST (256 * MIB)

struct block {
	int number;
	struct pfn_range range;
};

/* Blocks of ZONE_MOVABLE that can be offline. */
static struct block blocks[MAX_BLOCKS];
static int nr_blocks;
static struct pfn_range zone;
static long pool;			/* huge pages at the start, to be put back */

static struct {
	const struct kind *kind;
	struct books before;
	int memfd, ballast;
	char *mem;
	size_t size, pages;
	__u64 pfns[16 * MIB / PAGE];	/* before there was a buffer */
} t;

/* Memory blocks */

static const char *block_file(int number, const char *name)
{
	static char path[128];

	snprintf(path, sizeof(path), MEMORY "memory%d/%s", number, name);
	return path;
}

static bool is_online(const struct block *block)
{
	return !strcmp(read_word(block_file(block->number, "state")), "online");
}

static bool online(const struct block *block)
{
	return is_online(block) || write_file(block_file(block->number, "state"), "online_movable");
}

static long pages_in_blocks(const __u64 *pfns, size_t n)
{
	long in = 0;

	for (int i = 0; i < nr_blocks; i++)
		in += pfns_in(blocks[i].range, pfns, n);
	return in;
}

/* Its child: killed, it gives up. A page that is just being looked at may say EBUSY once. */
static void offline_or_exit(const struct block *block)
{
	for (int tries = 0; tries < 10; tries++) {
		if (write_file(block_file(block->number, "state"), "offline"))
			_exit(0);
		if (errno != EBUSY && errno != EAGAIN)
			break;
		usleep(10000);
	}
	_exit(errno);
}

/* Which pages of the memfd are in the block, in one word. 0: none is. */
static __u64 who_is_there(const struct block *block)
{
	static __u64 pfns[sizeof(t.pfns) / sizeof(*t.pfns)];
	__u64 hash = 0;

	if (!t.mem)
		return 0;
	/* A page that is about to be moved is not there, until it is touched. */
	for (size_t i = 0; i < t.pages; i++)
		*(volatile char *)(t.mem + i * PAGE);
	read_pfns(t.mem, t.pages, pfns);
	for (size_t i = 0; i < t.pages; i++)
		if (pfns_in(block->range, &pfns[i], 1))
			hash = (hash ^ pfns[i]) * 0x9e3779b97f4a7c15ULL + i;
	return hash;
}

/*
 * Returns 0, an errno, or -1 if it was stuck: the pages of the memfd that are there have long been
 * the same. Where there are none, nothing is known that could hold it up, and it is waited for.
 */
static int offline(const struct block *block)
{
	__u64 there = who_is_there(block), now;
	int status, polls = 0, same = 0;
	pid_t pid = fork();

	if (pid < 0)
		return errno;
	if (!pid)
		offline_or_exit(block);
	while (!waitpid(pid, &status, WNOHANG)) {
		usleep(20000);
		if (++polls % 10)
			continue;
		now = who_is_there(block);
		same = now == there ? same + 1 : 0;
		there = now;
		if ((there && same == 15) || polls == 30000)
			kill(pid, SIGKILL);
	}
	if (WIFEXITED(status))
		return WEXITSTATUS(status);
	printf("# memory%d is stuck, %s pages of the memfd\n", block->number,
	       there ? "with" : "without");
	return -1;
}

/* Tells how many went. All that did are to be brought back by online_all(). */
static int offline_all(void)
{
	int n = 0;

	for (int i = 0; i < nr_blocks; i++) {
		int error = offline(&blocks[i]);

		if (error > 0)
			printf("# memory%d: %s\n", blocks[i].number, strerror(error));
		if (error < 0)
			break;
		n += !error;
	}
	return n;
}

static int online_all(void)
{
	int n = 0;

	for (int i = 0; i < nr_blocks; i++)
		n += online(&blocks[i]);
	return n;
}

/* main() is the harness's. Its children inherit what is found here. */
static void __attribute__((constructor)) find_blocks(void)
{
	__u64 pages = strtoull(read_word(MEMORY "block_size_bytes"), NULL, 16) / PAGE;
	int all = 0;

	zone = zone_movable();
	pool = pool_value(POOL_2M, "nr_hugepages");
	if (!pages || zone.start == zone.end)
		return;
	for (__u64 n = zone.start / pages; n < zone.end / pages && nr_blocks < MAX_BLOCKS; n++) {
		struct block *block = &blocks[nr_blocks];

		block->number = n;
		block->range = (struct pfn_range) { n * pages, (n + 1) * pages };
		if (strcmp(read_word(block_file(n, "valid_zones")), "Movable"))
			continue;
		all++;
		if (offline(block))
			continue;
		if (!online(block))
			printf("# memory%d stays offline: %s\n", block->number, strerror(errno));
		nr_blocks++;
	}
	/* The free huge pages of a block that goes offline are gone. */
	write_number(POOL_2M "nr_hugepages", pool);
	printf("# %d of %d blocks of ZONE_MOVABLE can be offline\n", nr_blocks, all);
}

/* What is free in the zone then is free as if nobody had used it: whole, and in that order. */
static void refresh_zone(struct __test_metadata *_metadata)
{
	EXPECT_EQ(nr_blocks, offline_all());
	EXPECT_EQ(nr_blocks, online_all());
}

/*
 * All of the zone that can goes offline and comes back, at once. First the pool gives back what is
 * free: the base kernel would migrate huge pages within the block that is to go offline, from one
 * into the other, for ever.
 */
static void check_zone_can_leave(struct __test_metadata *_metadata)
{
	if (t.kind->pool)
		write_number(POOL_2M "nr_hugepages", pool_value(POOL_2M, "nr_hugepages") -
			     pool_value(POOL_2M, "free_hugepages"));
	refresh_zone(_metadata);
}

/* Cases */

FIXTURE(movable) {
};

FIXTURE_VARIANT(movable) {
	const struct kind *kind;
};

FIXTURE_VARIANT_ADD(movable, shmem) { .kind = &shmem };

FIXTURE_VARIANT_ADD(movable, shmem_thp) { .kind = &shmem_thp };

FIXTURE_VARIANT_ADD(movable, hugetlb) { .kind = &hugetlb };

/*
 * Huge pages can be migrated, so the kernel takes them from ZONE_MOVABLE while it is there. A hole
 * that is filled in for a pin needs one that is not: more than fit into what is left of the zone
 * when the blocks are offline. The pool gives the last it got first.
 */
static void fill_pool(struct __test_metadata *_metadata)
{
	EXPECT_EQ(nr_blocks, offline_all());
	write_number(POOL_2M "nr_hugepages", POOL_OUTSIDE);
	EXPECT_EQ(nr_blocks, online_all());
	write_number(POOL_2M "nr_hugepages", POOL_PAGES);
	EXPECT_EQ(POOL_PAGES, pool_value(POOL_2M, "free_hugepages"));
}

/*
 * What is free in the blocks of the zone that never go offline is taken before that which has been
 * online for a shorter time. Have another memfd take it.
 */
static void fill_what_cannot_leave(struct __test_metadata *_metadata)
{
	size_t at = 0;
	char *map;

	t.ballast = new_memfd(&shmem, BALLAST);
	ASSERT_LE(0, t.ballast);
	map = map_fd(t.ballast, BALLAST, PROT_READ | PROT_WRITE);
	ASSERT_NE(NULL, map);
	for (int inside = 0; inside < 4 && at < BALLAST; at += PAGE) {
		__u64 pfn;

		map[at] = 1;
		if (at / PAGE % 256)
			continue;	/* to look at each takes longer than to get it */
		pfn = pfn_of(map + at);
		inside = pages_in_blocks(&pfn, 1) ? inside + 1 : 0;
	}
	munmap(map, BALLAST);
}

static void start_case(struct __test_metadata *_metadata, const struct kind *kind)
{
	t.kind = kind;
	t.size = sizeof(t.pfns) / sizeof(*t.pfns) * PAGE;
	t.pages = t.size / PAGE;
	t.memfd = -1;
	t.ballast = -1;
	if (zone.start == zone.end)
		SKIP(LEAVE_SETUP, "no ZONE_MOVABLE: boot with movablecore=");
	ASSERT_NE(0, nr_blocks);
	write_number(POOL_2M "nr_hugepages", 0);
	if (kind->pool)
		fill_pool(_metadata);
	else
		refresh_zone(_metadata);
	t.before = read_books();
	fill_what_cannot_leave(_metadata);
	t.memfd = new_memfd(kind, t.size);
	ASSERT_LE(0, t.memfd);
	t.mem = map_fd(t.memfd, t.size, PROT_READ | PROT_WRITE);
	ASSERT_NE(NULL, t.mem);
}

static void end_case(struct __test_metadata *_metadata)
{
	if (t.mem)
		munmap(t.mem, t.size);
	t.mem = NULL;
	close(t.memfd);
	close(t.ballast);
	EXPECT_EQ(nr_blocks, online_all());
	if (t.kind->pool)
		write_number(POOL_2M "nr_hugepages", POOL_PAGES);
	EXPECT_SAME_BOOKS(t.before);
	write_number(POOL_2M "nr_hugepages", 0);
	write_number(POOL_2M "nr_hugepages", pool);
}

/*
 * Fills the memfd, and sees that it is made of what the kind says, most of it in the zone, and
 * enough of that in blocks that can be offline.
 */
static void fill_in_zone(struct __test_metadata *_metadata)
{
	size_t huge = t.kind->page / PAGE;

	fill(t.mem, 0, t.pages, 1000);
	ASSERT_TRUE(read_pfns(t.mem, t.pages, t.pfns));
	for (size_t i = 0; i < t.pages; i++)
		ASSERT_EQ(i % huge, (t.pfns[i] - t.pfns[i / huge * huge]));
	ASSERT_LE((long)(t.pages * 3 / 4), pfns_in(zone, t.pfns, t.pages));
	ASSERT_LE((long)(t.pages / 4), pages_in_blocks(t.pfns, t.pages));
}

/* @at shows pages that must not be in the zone: all of them are there, and none is. */
static void check_left_zone(struct __test_metadata *_metadata, char *at, size_t n)
{
	__u64 *pfns = calloc(n, sizeof(*pfns));

	for (size_t i = 0; i < n; i++)
		*(volatile char *)(at + i * PAGE);
	EXPECT_TRUE(read_pfns(at, n, pfns));
	EXPECT_EQ(0, pfns_in(zone, pfns, n));
	free(pfns);
}

/* How many of the @n pages from @first on are elsewhere than before there was a buffer. */
static long moved(size_t first, size_t n)
{
	__u64 *pfns = calloc(t.pages, sizeof(*pfns));
	long count = 0;

	if (!read_pfns(t.mem, t.pages, pfns))
		count = -1;
	for (size_t i = first; count >= 0 && i < first + n; i++)
		count += pfns[i] != t.pfns[i];
	free(pfns);
	return count;
}

FIXTURE_SETUP(movable)
{
	start_case(_metadata, variant->kind);
}

FIXTURE_TEARDOWN(movable)
{
	end_case(_metadata);
}

/* The frames that are pinned stay what they are, to the end. */
static void check_buffer(struct __test_metadata *_metadata, int buffer, size_t first, size_t n,
			 unsigned int who)
{
	char *at = t.mem + first * PAGE, *map;
	__u64 *pfns = calloc(n, sizeof(*pfns)), *later = calloc(n, sizeof(*later));

	ASSERT_LE(0, buffer);
	EXPECT_EQ(0, wrong(at, first, n, who));
	check_left_zone(_metadata, at, n);
	EXPECT_TRUE(read_pfns(at, n, pfns));
	map = map_buffer(t.kind, buffer, n * PAGE, PROT_READ | PROT_WRITE);
	EXPECT_NE(NULL, map);
	if (map) {
		EXPECT_EQ(0, wrong(map, first, n, who));
		start_user(_metadata, map, at, first, n, who);
	}
	check_zone_can_leave(_metadata);
	if (map) {
		stop_user(_metadata);
		EXPECT_EQ(0, wrong(map, first, n, user.who));
		munmap(map, n * PAGE);
	}
	EXPECT_TRUE(read_pfns(at, n, later));
	EXPECT_EQ(0, memcmp(pfns, later, n * sizeof(*pfns)));
	close(buffer);
	free(pfns);
	free(later);
}

TEST_F(movable, whole)
{
	fill_in_zone(_metadata);
	check_buffer(_metadata, create(t.memfd, 0, t.size), 0, t.pages, 1000);
}

/* The folios of the rest need not move, so they do not; but offline, all do. */
TEST_F(movable, part)
{
	size_t huge = t.kind->page / PAGE, first = t.pages / 4 + 3, n = t.pages / 2 - 6;
	size_t low = first / huge * huge, high = (first + n + huge - 1) / huge * huge;
	int buffer;

	fill_in_zone(_metadata);
	buffer = create(t.memfd, first * PAGE, n * PAGE);
	EXPECT_EQ(0, moved(0, low));
	EXPECT_EQ(0, moved(high, t.pages - high));
	EXPECT_EQ(pfns_in(zone, t.pfns + low, high - low), moved(low, high - low));
	check_buffer(_metadata, buffer, first, n, 1000);
	EXPECT_EQ(0, wrong(t.mem, 0, first, 1000));
	EXPECT_EQ(0, wrong(t.mem + (first + n) * PAGE, first + n, t.pages - first - n, 1000));
}

/* The trace counts the pages that had to move, and on the second time, none. */
TEST_F(movable, trace_counts_what_moved)
{
	size_t first = t.pages / 4, n = t.pages / 4;
	int buffer, second;
	long migrated;

	if (!has_event("memfd/memfd_pin_folios"))
		SKIP(return, "Needs: traces");
	ASSERT_TRUE(start_trace("memfd/memfd_pin_folios", 0));
	fill_in_zone(_metadata);
	buffer = create(t.memfd, first * PAGE, n * PAGE);
	EXPECT_LE(0, buffer);
	EXPECT_LT(0, pfns_in(zone, t.pfns + first, n));
	EXPECT_LT(0, traced(" migrated=", &migrated));
	EXPECT_EQ(pfns_in(zone, t.pfns + first, n), migrated);
	second = create(t.memfd, first * PAGE, n * PAGE);
	EXPECT_LT(0, traced(" migrated=", &migrated));
	EXPECT_EQ(0, migrated);
	close(second);
	close(buffer);
	end_trace();
}

/*
 * Each CPU keeps some pages to itself before they get to a list of the LRU, from which memory is
 * taken to be migrated. Memory that is on a list already does not need the other CPUs to give up
 * theirs: to wait for them takes long on a large machine, and disturbs who has a CPU to himself.
 */

#define DRAIN_EVENT "workqueue/workqueue_queue_work"
#define DRAIN "function=lru_add_drain_per_cpu"

static void use_cpu(int cpu)
{
	cpu_set_t cpus;

	CPU_ZERO(&cpus);
	CPU_SET(cpu, &cpus);
	sched_setaffinity(0, sizeof(cpus), &cpus);
}

/* Whoever moves pages drains all CPUs first, even if there is none to be moved. */
static void drain_all_cpus(struct __test_metadata *_metadata)
{
	int nodes[1], status[1];
	void *at[1];

	ASSERT_EQ(0, syscall(SYS_move_pages, 0, 0, at, nodes, status, 0));
}

/* How often this task had another CPU drained since it was last asked. */
static long drains(void)
{
	return traced(DRAIN, NULL);
}

TEST_F(movable, drains_no_other_cpu)
{
	size_t size = t.size / HUGE * PAGE;
	char *pages = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	bool kept = false;
	int buffer;

	if (sysconf(_SC_NPROCESSORS_ONLN) < 2)
		SKIP(return, "needs two CPUs");
	ASSERT_NE(MAP_FAILED, pages);
	fill_in_zone(_metadata);
	ASSERT_TRUE(start_trace(DRAIN_EVENT, getpid()));
	/* The other CPU has a page to give up, unless somebody else wants it, so look at once. */
	for (size_t at = 0; at < t.size && !kept; at += HUGE) {
		drain_all_cpus(_metadata);
		use_cpu(1);
		pages[at / HUGE * PAGE] = 1;
		use_cpu(0);
		drains();
		buffer = create(t.memfd, at, HUGE);
		EXPECT_EQ(0, drains());
		drain_all_cpus(_metadata);
		kept = drains();
		ASSERT_LE(0, buffer);
		check_left_zone(_metadata, t.mem + at, HUGE / PAGE);
		close(buffer);
	}
	EXPECT_TRUE(kept);
	EXPECT_EQ(0, wrong(t.mem, 0, t.pages, 1000));
	end_trace();
	munmap(pages, size);
}

/* This task is refused every page, or group of 2^order pages and more, that it asks for. */

#define FAIL_PAGE_ALLOC "/sys/kernel/debug/fail_page_alloc/"

/* To open a file may need a page: what ends the refusing is open before. */
static int refusing;

static bool refuse_pages(int order)
{
	refusing = open("/proc/self/make-it-fail", O_WRONLY | O_CLOEXEC);
	return write_number(FAIL_PAGE_ALLOC "min-order", order) &&
	       write_file(FAIL_PAGE_ALLOC "task-filter", "Y") &&
	       write_file(FAIL_PAGE_ALLOC "ignore-gfp-wait", "N") &&
	       write_file(FAIL_PAGE_ALLOC "ignore-gfp-highmem", "N") &&
	       write_file(FAIL_PAGE_ALLOC "verbose", "0") &&
	       write_file(FAIL_PAGE_ALLOC "times", "1000000") &&
	       write_file(FAIL_PAGE_ALLOC "probability", "100") &&
	       write(refusing, "1", 1) == 1;
}

static bool refuse_no_pages(void)
{
	bool ended = write(refusing, "0", 1) == 1;

	close(refusing);
	write_file(FAIL_PAGE_ALLOC "probability", "0");
	write_file(FAIL_PAGE_ALLOC "times", "1");
	write_file(FAIL_PAGE_ALLOC "verbose", "2");
	write_file(FAIL_PAGE_ALLOC "ignore-gfp-highmem", "Y");
	write_file(FAIL_PAGE_ALLOC "ignore-gfp-wait", "Y");
	write_file(FAIL_PAGE_ALLOC "task-filter", "N");
	write_number(FAIL_PAGE_ALLOC "min-order", 1);
	return ended;
}

/* The slab allocator then has what the driver will ask it for, on this CPU. */
static void warm_up(size_t size)
{
	int memfd = memfd_create("other", MFD_ALLOW_SEALING | MFD_CLOEXEC), buffer;

	use_cpu(sched_getcpu());
	if (!ftruncate(memfd, size) && !fcntl(memfd, F_ADD_SEALS, F_SEAL_SHRINK)) {
		buffer = create(memfd, 0, size);
		close(buffer);
	}
	close(memfd);
}

/* Memory to move to cannot be had: nobody else brings it back, so one attempt is enough. */
TEST_F(movable, without_memory_is_tried_once)
{
	size_t size = t.kind->page == PAGE ? 8 * PAGE : t.kind->page;
	int buffer;

	if (access(FAIL_PAGE_ALLOC, F_OK))
		SKIP(return, "no fail_page_alloc in this kernel");
	fill_in_zone(_metadata);
	ASSERT_LT(0, pfns_in(zone, t.pfns, size / PAGE));
	/* What is free in the pool would be taken. */
	if (t.kind->pool)
		write_number(POOL_2M "nr_hugepages", t.size / HUGE);
	warm_up(size);
	ASSERT_TRUE(start_trace(ATTEMPT_EVENT, getpid()));
	EXPECT_TRUE(refuse_pages(t.kind->pool ? 9 : 0));
	buffer = create(t.memfd, 0, size);
	EXPECT_TRUE(refuse_no_pages());
	EXPECT_EQ(-ENOMEM, buffer);
	EXPECT_EQ(1, traced(ATTEMPT, NULL));
	end_trace();
	EXPECT_EQ(t.before.pins, pins());
	EXPECT_EQ(0, wrong(t.mem, 0, t.pages, 1000));
	/* It is as movable as it was. */
	buffer = create(t.memfd, 0, size);
	ASSERT_LE(0, buffer);
	check_left_zone(_metadata, t.mem, size / PAGE);
	EXPECT_EQ(0, wrong(t.mem, 0, t.pages, 1000));
	close(buffer);
}

/* Ranges out of order, one of them within another, the last up to the end of the file. */
TEST_F(movable, list)
{
	size_t q = t.size / 4, huge = t.kind->page;
	struct udmabuf_create_item items[] = {
		{ .memfd = t.memfd, .offset = q, .size = q },
		{ .memfd = t.memfd, .offset = 3 * q + huge, .size = q - huge },
		{ .memfd = t.memfd, .offset = q + huge, .size = 3 * PAGE },
		{ .memfd = t.memfd, .offset = 0, .size = huge },
	};
	size_t size = 2 * q + 3 * PAGE;
	char *map, *at;
	int buffer;

	fill_in_zone(_metadata);
	buffer = create_list(items, 4);
	ASSERT_LE(0, buffer);
	check_left_zone(_metadata, t.mem, huge / PAGE);
	check_left_zone(_metadata, t.mem + q, q / PAGE);
	check_left_zone(_metadata, t.mem + 3 * q + huge, (q - huge) / PAGE);
	EXPECT_EQ(0, moved(huge / PAGE, (q - huge) / PAGE));
	EXPECT_EQ(0, moved(2 * q / PAGE, (q + huge) / PAGE));

	map = map_buffer(t.kind, buffer, size, PROT_READ | PROT_WRITE);
	EXPECT_NE(NULL, map);
	if (map)
		start_user(_metadata, map, t.mem + q, q / PAGE, q / PAGE, 1000);
	check_zone_can_leave(_metadata);
	if (map) {
		stop_user(_metadata);
		EXPECT_EQ(0, wrong(map, q / PAGE, q / PAGE, user.who));
		at = map + q;
		EXPECT_EQ(0, wrong(at, (3 * q + huge) / PAGE, (q - huge) / PAGE, 1000));
		at += q - huge;
		EXPECT_EQ(0, wrong(at, (q + huge) / PAGE, 3, user.who));
		at += 3 * PAGE;
		EXPECT_EQ(0, wrong(at, 0, huge / PAGE, 1000));
		munmap(map, size);
	}
	EXPECT_EQ(0, wrong(t.mem, 0, q / PAGE, 1000));
	EXPECT_EQ(0, wrong(t.mem + 2 * q, 2 * q / PAGE, 2 * q / PAGE, 1000));
	close(buffer);
}

/* What is filled in while pinning has not been in the zone at all, or has left it. */
TEST_F(movable, hole)
{
	int buffer = create(t.memfd, 0, t.size);

	ASSERT_LE(0, buffer);
	fill(t.mem, 0, t.pages, 1000);
	check_buffer(_metadata, buffer, 0, t.pages, 1000);
}

/* The pool has only pages of the zone left: the hole gets one of them, which then moves out. */
TEST(hole_of_hugetlb_while_only_the_zone_has_free_pages)
{
	const size_t size = POOL_PAGES * HUGE;
	long in_zone = 0;
	int others, buffer;
	char *map;

	if (zone.start == zone.end)
		SKIP(return, "no ZONE_MOVABLE: boot with movablecore=");
	start_case(_metadata, &hugetlb);
	/* Mapping it has reserved pages. */
	munmap(t.mem, t.size);
	close(t.memfd);
	t.memfd = new_memfd(&hugetlb, t.size);
	ASSERT_LE(0, t.memfd);
	others = new_memfd(&hugetlb, size);
	ASSERT_LE(0, others);
	map = map_fd(others, size, PROT_READ | PROT_WRITE);
	ASSERT_NE(NULL, map);
	for (size_t at = 0; at < size; at += HUGE)
		map[at] = 1;
	ASSERT_EQ(0, pool_value(POOL_2M, "free_hugepages"));
	for (size_t at = 0; at < size; at += HUGE) {
		__u64 pfn = pfn_of(map + at);

		if (!pfns_in(zone, &pfn, 1))
			continue;
		ASSERT_EQ(0, fallocate(others, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at, HUGE));
		in_zone++;
	}
	ASSERT_LE((long)(t.size / HUGE), in_zone);
	EXPECT_EQ(in_zone, pool_value(POOL_2M, "free_hugepages"));

	buffer = create(t.memfd, 0, t.size);
	EXPECT_LE(0, buffer);
	t.mem = map_fd(t.memfd, t.size, PROT_READ | PROT_WRITE);
	ASSERT_NE(NULL, t.mem);
	if (buffer >= 0) {
		fill(t.mem, 0, t.pages, 1000);
		check_buffer(_metadata, buffer, 0, t.pages, 1000);
	}
	munmap(map, size);
	close(others);
	end_case(_metadata);
}

/* Every other folio is there, and in the zone. */
TEST_F(movable, every_other_folio)
{
	size_t huge = t.kind->page;
	int buffer;

	fill_in_zone(_metadata);
	for (size_t at = 0; at < t.size; at += 2 * huge)
		ASSERT_EQ(0, fallocate(t.memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at,
				       huge));
	buffer = create(t.memfd, 0, t.size);
	ASSERT_LE(0, buffer);
	for (size_t at = 0; at < t.size; at += 2 * huge) {
		EXPECT_EQ(0, (long)*stamp_of(t.mem + at, at / PAGE));
		fill(t.mem + at, at / PAGE, huge / PAGE, 1000);
	}
	check_buffer(_metadata, buffer, 0, t.pages, 1000);
}

/*
 * Buffers come and go while blocks do: what is to be pinned is being moved already, by those who
 * take the block away, or in a page block that is isolated. Too busy is an answer, if none stays
 * pinned for it; but what was made has left the zone.
 */
static void *shuttle(void *arg)
{
	(void)arg;
	for (int i = 0; !user.stop; i++) {
		/* Killed by nobody here: what can be in the way goes away soon. */
		if (write_file(block_file(blocks[i % nr_blocks].number, "state"), "offline"))
			user.rounds++;
		for (int tries = 0; tries < 100 && !online(&blocks[i % nr_blocks]); tries++)
			usleep(1000);
	}
	return NULL;
}

TEST_F(movable, while_blocks_come_and_go)
{
	long made = 0, busy = 0, in_zone = 0;

	ASSERT_EQ(0, pthread_create(&user.thread, NULL, shuttle, NULL));
	for (int i = 0; i < 2000 && (i < 10 || user.rounds < 4 || !made); i++) {
		int buffer;

		ASSERT_EQ(0, fallocate(t.memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0,
				       t.size));
		fill(t.mem, 0, t.pages, i);
		buffer = create(t.memfd, 0, t.size);
		EXPECT_EQ(0, wrong(t.mem, 0, t.pages, i));
		if (buffer < 0) {
			EXPECT_EQ(-ENOMEM, buffer);
			busy++;
			continue;
		}
		made++;
		EXPECT_TRUE(read_pfns(t.mem, t.pages, t.pfns));
		in_zone += pfns_in(zone, t.pfns, t.pages);
		close(buffer);
	}
	user.stop = true;
	/* Huge pages that are there can be migrated for ever: see check_zone_can_leave(). */
	ASSERT_EQ(0, fallocate(t.memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, t.size));
	pthread_join(user.thread, NULL);
	printf("# %ld buffers made, %ld refused, %ld blocks offline meanwhile\n", made, busy,
	       user.rounds);
	EXPECT_EQ(0, in_zone);
	EXPECT_LT(0, made);
}

/* What comes back from swap to be pinned. Huge pages come back small. */

FIXTURE(swapped_out) {
};

FIXTURE_VARIANT(swapped_out) {
	const struct kind *kind;
};

FIXTURE_VARIANT_ADD(swapped_out, shmem) { .kind = &shmem };

FIXTURE_VARIANT_ADD(swapped_out, shmem_thp) { .kind = &shmem_thp };

FIXTURE_SETUP(swapped_out)
{
	start_case(_metadata, variant->kind);
}

FIXTURE_TEARDOWN(swapped_out)
{
	end_case(_metadata);
}

TEST_F(swapped_out, comes_back_elsewhere)
{
	unsigned char in[sizeof(t.pfns) / sizeof(*t.pfns)];
	size_t stay = t.pages;

	fill_in_zone(_metadata);
	for (int tries = 0; tries < 20 && stay > t.pages / 4; tries++) {
		madvise(t.mem, t.size, MADV_PAGEOUT);
		ASSERT_EQ(0, mincore(t.mem, t.size, in));
		stay = 0;
		for (size_t i = 0; i < t.pages; i++)
			stay += in[i] & 1;
	}
	printf("# %zu of %zu pages were not swapped out\n", stay, t.pages);
	ASSERT_GE(t.pages / 4, stay);
	check_buffer(_metadata, create(t.memfd, 0, t.size), 0, t.pages, 1000);
}

TEST_HARNESS_MAIN
