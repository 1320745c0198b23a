// SPDX-License-Identifier: GPL-2.0
/*
 * Promised: what a buffer has pinned is not in a CMA area. It was moved out of there, with its
 * content, while others went on using it; and what had to be allocated was taken from elsewhere.
 *
 * A user whose camera or display allocates from the area would find, if this were not so, that it
 * fails, as soon as somebody made a buffer of memory that happened to be there.
 *
 * So: count by page frame how much of a memfd is in the area, before and after a buffer is made;
 * then allocate all of the area, through debugfs, while the buffer is written through and read.
 * Movable memory is taken from the area as long as more of it is free than of the rest of the
 * zone. The area is the one that huge pages of 1 GiB can be allocated from; here, none are.
 *
 * VM: MEM=4096 SMP=2 APPEND="hugetlb_cma=1G"
 */

#include "moving.h"

#define AREA "/sys/kernel/debug/cma/hugetlb0/"
#define REST (400 * MIB)		/* what is left free outside of the area */
#define POOL_OUTSIDE 16			/* huge pages, while a case on hugetlb runs */
#define POOL_PAGES 32
#define SIZE (16 * MIB)
#define PAGES (SIZE / PAGE)

static struct pfn_range area;
static long area_pages;

static struct {
	const struct kind *kind;
	struct books before;
	long pool;			/* to be put back */
	int memfd;
	char *mem;
} t;

/* main() is the harness's. Its children inherit what is found here. */
static void __attribute__((constructor)) find_area(void)
{
	area_pages = value_of(AREA "count", "");
	area.start = value_of(AREA "base_pfn", "");
	area.end = area.start + area_pages;
}

/* A page that is just being looked at cannot be moved, and can a moment later. */
static bool allocate_area(void)
{
	bool ok = false;

	for (int tries = 0; tries < 10 && !ok; tries++) {
		ok = write_number(AREA "alloc", area_pages);
		if (!ok)
			usleep(20000);
	}
	return ok;
}

static void free_area(void)
{
	write_number(AREA "free", area_pages);
}

/*
 * Whenever a huge page that lies in this area is freed, the base kernel takes it for one that was
 * allocated from it, and counts it as no longer used: so with a pool, "used" is not exact.
 */
static void check_area_can_be_allocated(struct __test_metadata *_metadata)
{
	EXPECT_TRUE(allocate_area());
	if (!t.kind->pool)
		EXPECT_EQ(area_pages, value_of(AREA "used", ""));
	free_area();
	EXPECT_EQ(0, value_of(AREA "used", ""));
}

FIXTURE(cma) {
};

FIXTURE_VARIANT(cma) {
	const struct kind *kind;
};

FIXTURE_VARIANT_ADD(cma, shmem) { .kind = &shmem };

FIXTURE_VARIANT_ADD(cma, shmem_thp) { .kind = &shmem_thp };

FIXTURE_VARIANT_ADD(cma, hugetlb) { .kind = &hugetlb };

/*
 * Huge pages can be migrated, so the kernel takes them from the area too. A hole that is filled
 * in for a pin needs one that is not; the pool gives the last it got first.
 */
static void fill_pool(struct __test_metadata *_metadata)
{
	ASSERT_TRUE(allocate_area());
	write_number(POOL_2M "nr_hugepages", POOL_OUTSIDE);
	free_area();
	write_number(POOL_2M "nr_hugepages", POOL_PAGES);
	ASSERT_EQ(POOL_PAGES, pool_value(POOL_2M, "free_hugepages"));
}

/*
 * Movable pages are taken from the area as long as it has more than half of what is free. So have
 * huge pages take what is free outside of it, but for some.
 */
static void fill_the_rest(struct __test_metadata *_metadata)
{
	long kb;

	ASSERT_TRUE(allocate_area());
	kb = value_of("/proc/meminfo", "MemFree") - (long)(REST / KIB);
	write_number(POOL_2M "nr_hugepages", kb / (long)(HUGE / KIB));
	free_area();
}

FIXTURE_SETUP(cma)
{
	t.kind = variant->kind;
	t.memfd = -1;
	t.pool = pool_value(POOL_2M, "nr_hugepages");
	if (area_pages <= 0)
		SKIP(LEAVE_SETUP, "no CMA area: boot with hugetlb_cma=");
	ASSERT_EQ(0, value_of(AREA "used", ""));
	write_number(POOL_2M "nr_hugepages", 0);
	if (t.kind->pool)
		fill_pool(_metadata);
	else
		fill_the_rest(_metadata);
	t.before = read_books();
	t.memfd = new_memfd(t.kind, SIZE);
	ASSERT_LE(0, t.memfd);
	t.mem = map_fd(t.memfd, SIZE, PROT_READ | PROT_WRITE);
	ASSERT_NE(NULL, t.mem);
}

FIXTURE_TEARDOWN(cma)
{
	if (t.mem)
		munmap(t.mem, SIZE);
	close(t.memfd);
	EXPECT_SAME_BOOKS(t.before);
	write_number(POOL_2M "nr_hugepages", 0);
	write_number(POOL_2M "nr_hugepages", t.pool);
}

/*
 * Fills the memfd, and sees that it is made of what the kind says, and is in the area, a quarter
 * of it at least: where the area and the rest have as much left, pages come from both in turn.
 */
static void fill_in_area(struct __test_metadata *_metadata, __u64 *pfns)
{
	size_t huge = t.kind->page / PAGE;

	fill(t.mem, 0, PAGES, 1000);
	ASSERT_TRUE(read_pfns(t.mem, PAGES, pfns));
	for (size_t i = 0; i < PAGES; i++)
		ASSERT_EQ(i % huge, (pfns[i] - pfns[i / huge * huge]));
	ASSERT_LE((long)PAGES / 4, pfns_in(area, pfns, PAGES));
	printf("# %ld of %ld pages are in the area\n", pfns_in(area, pfns, PAGES), (long)PAGES);
}

/* @first to @first + @n is what the buffer shows. */
static void check_buffer(struct __test_metadata *_metadata, int buffer, size_t first, size_t n)
{
	char *at = t.mem + first * PAGE, *map;
	__u64 pfns[PAGES], later[PAGES];

	ASSERT_LE(0, buffer);
	EXPECT_EQ(0, wrong(at, first, n, 1000));
	EXPECT_TRUE(read_pfns(at, n, pfns));
	EXPECT_EQ(0, pfns_in(area, pfns, n));
	map = map_buffer(t.kind, buffer, n * PAGE, PROT_READ | PROT_WRITE);
	EXPECT_NE(NULL, map);
	if (map) {
		EXPECT_EQ(0, wrong(map, first, n, 1000));
		start_user(_metadata, map, at, first, n, 1000);
	}
	check_area_can_be_allocated(_metadata);
	if (map) {
		stop_user(_metadata);
		EXPECT_EQ(0, wrong(map, first, n, user.who));
		EXPECT_EQ(0, wrong(at, first, n, user.who));
		munmap(map, n * PAGE);
	}
	EXPECT_TRUE(read_pfns(at, n, later));
	EXPECT_EQ(0, memcmp(pfns, later, n * sizeof(*pfns)));
	close(buffer);
}

TEST_F(cma, whole)
{
	__u64 pfns[PAGES];

	fill_in_area(_metadata, pfns);
	check_buffer(_metadata, create(t.memfd, 0, SIZE), 0, PAGES);
}

/* The folios of the rest need not move, so they do not, until the area is allocated. */
TEST_F(cma, part)
{
	size_t huge = t.kind->page / PAGE, first = PAGES / 4 + 3, n = PAGES / 2 - 6;
	size_t low = first / huge * huge, high = (first + n + huge - 1) / huge * huge;
	__u64 pfns[PAGES], later[PAGES];
	int buffer;

	fill_in_area(_metadata, pfns);
	buffer = create(t.memfd, first * PAGE, n * PAGE);
	ASSERT_LE(0, buffer);
	EXPECT_TRUE(read_pfns(t.mem, PAGES, later));
	EXPECT_EQ(0, memcmp(pfns, later, low * sizeof(*pfns)));
	EXPECT_EQ(0, memcmp(pfns + high, later + high, (PAGES - high) * sizeof(*pfns)));
	EXPECT_EQ(0, pfns_in(area, later + low, high - low));
	check_buffer(_metadata, buffer, first, n);
	EXPECT_EQ(0, wrong(t.mem, 0, first, 1000));
	EXPECT_EQ(0, wrong(t.mem + (first + n) * PAGE, first + n, PAGES - first - n, 1000));
	EXPECT_TRUE(read_pfns(t.mem, PAGES, later));
}

/* Every other folio is a hole. */
TEST_F(cma, holes)
{
	__u64 pfns[PAGES];
	int buffer;

	fill_in_area(_metadata, pfns);
	for (size_t at = 0; at < SIZE; at += 2 * t.kind->page)
		ASSERT_EQ(0, fallocate(t.memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at,
				       t.kind->page));
	buffer = create(t.memfd, 0, SIZE);
	ASSERT_LE(0, buffer);
	for (size_t at = 0; at < SIZE; at += 2 * t.kind->page) {
		EXPECT_EQ(0, (long)*stamp_of(t.mem + at, at / PAGE));
		fill(t.mem + at, at / PAGE, t.kind->page / PAGE, 1000);
	}
	check_buffer(_metadata, buffer, 0, PAGES);
}

/*
 * Buffers are made while the area is allocated and freed. Too busy is an answer, if none stays
 * pinned for it; but what was made is not in the area.
 */
static void *allocate_and_free(void *arg)
{
	(void)arg;
	while (!user.stop) {
		if (write_number(AREA "alloc", area_pages))
			user.rounds++;
		free_area();
	}
	return NULL;
}

TEST_F(cma, while_the_area_is_allocated)
{
	long made = 0, busy = 0, inside = 0;
	__u64 pfns[PAGES];

	ASSERT_EQ(0, pthread_create(&user.thread, NULL, allocate_and_free, NULL));
	for (int i = 0; i < 2000 && (i < 10 || user.rounds < 3); i++) {
		int buffer;

		ASSERT_EQ(0, fallocate(t.memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0,
				       SIZE));
		fill(t.mem, 0, PAGES, i);
		buffer = create(t.memfd, 0, SIZE);
		if (buffer < 0) {
			EXPECT_EQ(-ENOMEM, buffer);
			busy++;
		}
		EXPECT_EQ(0, wrong(t.mem, 0, PAGES, i));
		if (buffer >= 0) {
			EXPECT_TRUE(read_pfns(t.mem, PAGES, pfns));
			inside += pfns_in(area, pfns, PAGES);
			made++;
			close(buffer);
		}
	}
	user.stop = true;
	pthread_join(user.thread, NULL);
	printf("# %ld buffers made, %ld refused, area allocated %ld times meanwhile\n", made, busy,
	       user.rounds);
	EXPECT_EQ(0, inside);
	EXPECT_LT(0, made);
	EXPECT_LT(0, user.rounds);
}

TEST_HARNESS_MAIN
