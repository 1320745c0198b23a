// SPDX-License-Identifier: GPL-2.0
/*
 * Promised: a pin holds memory, not its place in a file. When a hole is punched under a buffer,
 * the buffer keeps the memory it has, with the content, and the memfd gets other memory there as
 * soon as it is used: from then on they have nothing to do with each other.
 *
 * A user would notice the opposite as a device or a program that writes into memory which the
 * kernel has given to somebody else meanwhile; or as memory that does not come back.
 *
 * So: punch holes of each size and place under buffers that are mapped and not, and compare
 * content and page frames of both sides; see that a later buffer is of the new memory, that each
 * lives as long as its users, and that the kernel's log has no complaint about a page.
 *
 * Where a hole covers a part of a folio only, the folio stays the file's, and both see zeros.
 *
 * VM: MEM=2048 SMP=2
 */

#include "promise.h"

#define SIZE (8 * MIB)
#define PAGES (SIZE / PAGE)
#define SEED 20221211

static struct {
	const struct kind *kind;
	struct books before;
	int kmsg, memfd, buffer;
	char *mem, *map;
	__u64 pfns[PAGES];		/* of the memory that the buffer has */
	char untouched[SIZE];
} t;

/* How often the kernel has found something wrong with a page since the case began. */
static int page_complaints(void)
{
	static char record[8192];
	ssize_t len;
	int n = 0;

	while ((len = read(t.kmsg, record, sizeof(record) - 1)) > 0) {
		record[len] = 0;
		n += strstr(record, "BUG: ") || strstr(record, "WARNING: ");
	}
	return n;
}

FIXTURE(punch) {
};

FIXTURE_VARIANT(punch) {
	const struct kind *kind;
};

FIXTURE_VARIANT_ADD(punch, shmem) { .kind = &shmem };

FIXTURE_VARIANT_ADD(punch, shmem_thp) { .kind = &shmem_thp };

FIXTURE_VARIANT_ADD(punch, hugetlb) { .kind = &hugetlb };

static char *map_it(struct __test_metadata *_metadata, int buffer)
{
	char *map;

	ASSERT_LE(0, buffer);
	map = map_buffer(t.kind, buffer, SIZE, PROT_READ | PROT_WRITE);
	ASSERT_NE(NULL, map);
	return map;
}

/* A buffer of the whole memfd; of its mapping, a part is touched. */
FIXTURE_SETUP(punch)
{
	size_t huge = variant->kind->page / PAGE;

	t.kind = variant->kind;
	t.memfd = -1;
	t.buffer = -1;
	t.kmsg = open("/dev/kmsg", O_RDONLY | O_NONBLOCK | O_CLOEXEC);
	ASSERT_LE(0, t.kmsg);
	lseek(t.kmsg, 0, SEEK_END);
	t.before = read_books();
	t.memfd = new_memfd(t.kind, SIZE);
	ASSERT_LE(0, t.memfd);
	t.mem = map_fd(t.memfd, SIZE, PROT_READ | PROT_WRITE);
	ASSERT_NE(NULL, t.mem);
	fill(t.mem, 0, PAGES, 1000);
	t.buffer = create(t.memfd, 0, SIZE);
	ASSERT_LE(0, t.buffer);
	ASSERT_TRUE(read_pfns(t.mem, PAGES, t.pfns));
	for (size_t i = 0; i < PAGES; i++)
		ASSERT_EQ(i % huge, (t.pfns[i] - t.pfns[i / huge * huge]));
	t.map = map_it(_metadata, t.buffer);
	ASSERT_EQ(0, wrong(t.map, 0, PAGES / 2, 1000));
}

FIXTURE_TEARDOWN(punch)
{
	if (t.map)
		munmap(t.map, SIZE);
	if (t.mem)
		munmap(t.mem, SIZE);
	close(t.buffer);
	close(t.memfd);
	EXPECT_SAME_BOOKS(t.before);
	EXPECT_EQ(0, page_complaints());
}

static void punch(struct __test_metadata *_metadata, size_t from, size_t to)
{
	ASSERT_EQ(0, fallocate(t.memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, from,
			       to - from));
}

static long nonzero(const char *at, size_t size)
{
	const __u64 *word = (const __u64 *)at;
	long n = 0;

	for (size_t i = 0; i < size / sizeof(*word); i++)
		n += word[i] != 0;
	return n;
}

/* How many of the memfd's pages from @first on are of the memory that the buffer has. */
static long shared(size_t first, size_t n)
{
	static __u64 pfns[PAGES];
	long count = 0;

	if (!read_pfns(t.mem + first * PAGE, n, pfns))
		return -1;
	for (size_t i = 0; i < n; i++)
		for (size_t k = 0; k < PAGES; k++)
			count += pfns[i] == t.pfns[k];
	return count;
}

/* How many huge pages are in use, with what the case began with as zero. */
static long in_use(void)
{
	return t.before.free - pool_value(POOL_2M, "free_hugepages");
}

static long huge_pages(size_t size)
{
	return t.kind->pool ? size / t.kind->page : 0;
}

/*
 * The hole is pages @first to @first + @n, and the rest is shared still. Both mappings of the
 * buffer, the one that was there and one that is made now, show the old content.
 */
static void check_apart(struct __test_metadata *_metadata, size_t first, size_t n)
{
	char *at = t.mem + first * PAGE, *map = map_it(_metadata, t.buffer);

	EXPECT_EQ(0, wrong(t.map, 0, PAGES, 1000));
	EXPECT_EQ(0, nonzero(at, n * PAGE));
	EXPECT_EQ(0, wrong(map, 0, PAGES, 1000));

	fill(map, 0, PAGES, 1001);
	EXPECT_EQ(0, nonzero(at, n * PAGE));
	EXPECT_EQ(0, wrong(t.map, 0, PAGES, 1001));
	EXPECT_EQ(0, wrong(t.mem, 0, first, 1001));
	EXPECT_EQ(0, wrong(at + n * PAGE, first + n, PAGES - first - n, 1001));

	fill(at, first, n, 1002);
	EXPECT_EQ(0, wrong(t.map, 0, PAGES, 1001));
	EXPECT_EQ(0, shared(first, n));
	EXPECT_EQ((long)(PAGES - n), shared(0, first) + shared(first + n, PAGES - first - n));
	EXPECT_EQ(huge_pages(SIZE + n * PAGE), in_use());
	munmap(map, SIZE);
}

/* A buffer that is made now is of what the memfd has now. It outlives the other one. */
static void check_second_buffer(struct __test_metadata *_metadata, size_t first, size_t n)
{
	int buffer = create(t.memfd, 0, SIZE);
	char *map = map_it(_metadata, buffer);

	EXPECT_EQ(0, wrong(map, 0, first, 1001));
	EXPECT_EQ(0, wrong(map + first * PAGE, first, n, 1002));
	EXPECT_EQ(0, wrong(map + (first + n) * PAGE, first + n, PAGES - first - n, 1001));
	munmap(t.map, SIZE);
	t.map = NULL;
	close(t.buffer);
	t.buffer = -1;
	EXPECT_EQ(huge_pages(SIZE), in_use());
	fill(map, 0, PAGES, 1003);
	EXPECT_EQ(0, wrong(t.mem, 0, PAGES, 1003));
	munmap(map, SIZE);
	close(buffer);
}

TEST_F(punch, whole)
{
	punch(_metadata, 0, SIZE);
	EXPECT_EQ(huge_pages(SIZE), in_use());
	check_apart(_metadata, 0, PAGES);
	check_second_buffer(_metadata, 0, PAGES);
}

/* One folio; the mapping of the buffer has been touched on the one side of it, or there. */
TEST_F(punch, one_folio)
{
	size_t huge = t.kind->page, first = SIZE / 2 - huge;

	punch(_metadata, first, first + huge);
	check_apart(_metadata, first / PAGE, huge / PAGE);
	check_second_buffer(_metadata, first / PAGE, huge / PAGE);
}

/* From what was touched to what was not; where folios are small, the middle of a fault window. */
TEST_F(punch, some_folios)
{
	size_t huge = t.kind->page, first = SIZE / 2 - huge, end = SIZE / 2 + huge;

	punch(_metadata, first, end);
	check_apart(_metadata, first / PAGE, (end - first) / PAGE);
	check_second_buffer(_metadata, first / PAGE, (end - first) / PAGE);
}

/* Nothing was mapped when the hole was punched, and the memfd is gone before anything is. */
TEST_F(punch, buffer_is_all_that_is_left)
{
	munmap(t.map, SIZE);
	t.map = NULL;
	punch(_metadata, 0, SIZE);
	munmap(t.mem, SIZE);
	t.mem = NULL;
	close(t.memfd);
	t.memfd = -1;
	EXPECT_EQ(huge_pages(SIZE), in_use());
	t.map = map_it(_metadata, t.buffer);
	EXPECT_EQ(0, wrong(t.map, 0, PAGES, 1000));
	fill(t.map, 0, PAGES, 1001);
	EXPECT_EQ(0, wrong(t.map, 0, PAGES, 1001));
}

/* Less than a folio: it stays, with zeros in it. */
TEST_F(punch, inside_a_folio)
{
	size_t huge = t.kind->page, from = 2 * huge + huge / 4, to = from + huge / 8;
	char *map;

	memset(t.map, 0x5a, SIZE);
	punch(_metadata, from, to);
	map = map_it(_metadata, t.buffer);
	EXPECT_EQ(0, nonzero(t.mem + from, to - from));
	EXPECT_EQ(0, nonzero(t.map + from, to - from));
	EXPECT_EQ(0, nonzero(map + from, to - from));
	memset(t.mem + from, 0x5a, to - from);
	memset(t.untouched, 0x5a, SIZE);
	EXPECT_EQ(0, memcmp(t.mem, t.untouched, SIZE));
	EXPECT_EQ(0, memcmp(map, t.untouched, SIZE));
	EXPECT_EQ((long)PAGES, shared(0, PAGES));
	fill(map, 0, PAGES, 1001);
	EXPECT_EQ(0, wrong(t.mem, 0, PAGES, 1001));
	munmap(map, SIZE);
}

/* From inside one folio to inside another: those between go, those two stay. */
TEST_F(punch, from_inside_one_folio_to_inside_another)
{
	size_t huge = t.kind->page, low = SIZE / 2 - 2 * huge, high = SIZE / 2 + huge;
	size_t from = low + huge / 2, to = high + huge / 2, gone = low + huge;

	memset(t.map, 0x5a, SIZE);
	memset(t.untouched, 0x5a, SIZE);
	punch(_metadata, from, to);
	EXPECT_EQ(0, nonzero(t.mem + from, to - from));
	EXPECT_EQ(0, nonzero(t.map + from, gone - from));
	EXPECT_EQ(0, nonzero(t.map + high, to - high));
	EXPECT_EQ(0, memcmp(t.map, t.untouched, from));
	EXPECT_EQ(0, memcmp(t.map + gone, t.untouched, high - gone));
	EXPECT_EQ(0, memcmp(t.map + to, t.untouched, SIZE - to));
	EXPECT_EQ(0, memcmp(t.mem, t.untouched, from));
	EXPECT_EQ(0, memcmp(t.mem + to, t.untouched, SIZE - to));

	fill(t.mem, 0, PAGES, 1001);
	EXPECT_EQ(0, wrong(t.map, 0, gone / PAGE, 1001));
	EXPECT_EQ(0, wrong(t.map + high, high / PAGE, (SIZE - high) / PAGE, 1001));
	EXPECT_EQ(0, memcmp(t.map + gone, t.untouched, high - gone));
	EXPECT_EQ(0, shared(gone / PAGE, (high - gone) / PAGE));
	EXPECT_EQ((long)(PAGES - (high - gone) / PAGE),
		  shared(0, gone / PAGE) + shared(high / PAGE, (SIZE - high) / PAGE));
}

/* The seal that a buffer asks for does not forbid holes, nor a file that grows. */
TEST_F(punch, file_grows_but_does_not_shrink)
{
	int buffer;
	char *map;

	punch(_metadata, 0, SIZE);
	EXPECT_EQ(-1, ftruncate(t.memfd, SIZE - t.kind->page));
	EXPECT_EQ(EPERM, errno);
	ASSERT_EQ(0, ftruncate(t.memfd, 2 * SIZE));
	EXPECT_EQ(-1, ftruncate(t.memfd, SIZE));
	EXPECT_EQ(EPERM, errno);
	fill(t.mem, 0, PAGES, 1002);
	buffer = create(t.memfd, SIZE, SIZE);
	map = map_it(_metadata, buffer);
	EXPECT_EQ(0, nonzero(map, SIZE));
	fill(map, 0, PAGES, 1003);
	EXPECT_EQ(0, wrong(t.map, 0, PAGES, 1000));
	EXPECT_EQ(0, wrong(t.mem, 0, PAGES, 1002));
	EXPECT_EQ(huge_pages(3 * SIZE), in_use());
	munmap(map, SIZE);
	close(buffer);
}

/* Buffers of one range of one memfd, each of memory of its own, and all of them alive. */
TEST_F(punch, generations)
{
	enum { N = 8 };
	long kb = available_kb(), lost = 0;
	int buffers[N];
	char *map;

	for (int i = 0; i < N; i++) {
		punch(_metadata, 0, SIZE);
		fill(t.mem, 0, PAGES, i);
		buffers[i] = create(t.memfd, 0, SIZE);
		ASSERT_LE(0, buffers[i]);
	}
	EXPECT_EQ(huge_pages((N + 1) * SIZE), in_use());
	/* 0, 3, 6, 1, 4, ... */
	for (int k = 0, i = 0; k < N; k++, i = (i + 3) % N) {
		map = map_it(_metadata, buffers[i]);
		EXPECT_EQ(0, wrong(map, 0, PAGES, i));
		munmap(map, SIZE);
		close(buffers[i]);
	}
	EXPECT_EQ(0, wrong(t.map, 0, PAGES, 1000));
	EXPECT_EQ(0, wrong(t.mem, 0, PAGES, N - 1));
	EXPECT_EQ(huge_pages(2 * SIZE), in_use());
	/* The memfd has as much as before, and the first buffer what the memfd then had. */
	for (int tries = 0; tries < 100; tries++) {
		lost = kb - available_kb() - (t.kind->pool ? 0 : (long)(SIZE / KIB));
		if (lost < (long)(SIZE / KIB))
			break;
		usleep(20000);
	}
	EXPECT_GT((long)(SIZE / KIB), lost);
}

/* Holes are punched and filled while mappings of the buffer are faulted in. */

static atomic_bool stop;

static void *punch_and_fill(void *arg)
{
	unsigned int seed = SEED;
	long *rounds = arg;

	while (!stop) {
		size_t from = rand_r(&seed) % (PAGES / 2) * PAGE;
		size_t to = from + (rand_r(&seed) % (PAGES / 2) + 1) * PAGE;

		/* Whole folios, so that the buffer keeps what it has. */
		from = from / t.kind->page * t.kind->page;
		to = (to + t.kind->page - 1) / t.kind->page * t.kind->page;
		fallocate(t.memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, from, to - from);
		fill(t.mem + from, from / PAGE, (to - from) / PAGE, 1002);
		++*rounds;
	}
	return NULL;
}

TEST_F(punch, while_mappings_are_faulted_in)
{
	unsigned int seed = SEED + 1;
	long rounds = 0, bad = 0;
	pthread_t thread;

	punch(_metadata, 0, SIZE);
	ASSERT_EQ(0, pthread_create(&thread, NULL, punch_and_fill, &rounds));
	for (int i = 0; i < 100; i++) {
		char *map = map_it(_metadata, t.buffer);

		for (int k = 0; k < 64; k++) {
			size_t page = rand_r(&seed) % PAGES;

			bad += wrong(map + page * PAGE, page, 1, 1000);
			fill(map + page * PAGE, page, 1, 1000);
		}
		munmap(map, SIZE);
		sched_yield();
	}
	stop = true;
	pthread_join(thread, NULL);
	printf("# seed %d: 6400 pages touched in 100 mappings, %ld holes meanwhile\n", SEED,
	       rounds);
	EXPECT_EQ(0, bad);
	EXPECT_EQ(0, wrong(t.map, 0, PAGES, 1000));
}

TEST_HARNESS_MAIN
