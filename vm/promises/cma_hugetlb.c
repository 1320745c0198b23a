// SPDX-License-Identifier: GPL-2.0
/*
 * Promised: as in cma.c, for what such an area is kept for on most machines: huge pages of 1 GiB.
 * One that is in the area moves out of it to be pinned, as long as the pool has another one; no
 * kernel makes a page of this size only to migrate to it. If it has none, the answer is ENOMEM.
 *
 * A user would notice the opposite when the pool is shrunk and the memory does not come back to
 * the area, from where it was lent.
 *
 * So: have one page in the area and one outside, which the pool gets once the area is empty; then
 * make buffers, shrink the pool, and see whether all of the area can be allocated.
 *
 * The pool finds a second page only where the kernel has put nothing of its own: the debug kernel, which
 * keeps much, leaves no such place in 7 GiB. No more memory is used for it than the pages take.
 *
 * VM: MEM=11264 SMP=2 APPEND="hugetlb_cma=1G"
 */

#include "moving.h"
#include "trace.h"

#define AREA "/sys/kernel/debug/cma/hugetlb0/"
#define STEP 61				/* every so many pages have a stamp */

static const struct kind hugetlb_1g = {
	.name = "hugetlb_1g", .page = GIB, .memfd_flags = MFD_HUGETLB | MFD_HUGE_1GB,
	.thp = "never", .pool = POOL_1G,
};

static struct {
	struct pfn_range area;
	struct books before;
	long pages, pool_2m;
	int memfd;
	char *mem;
} t;

static void stamp_some(char *at, unsigned int who)
{
	for (size_t i = 0; i < GIB / PAGE; i += STEP)
		fill(at + i * PAGE, i, 1, who);
}

static long wrong_of_some(char *at, unsigned int who)
{
	long bad = 0;

	for (size_t i = 0; i < GIB / PAGE; i += STEP)
		bad += wrong(at + i * PAGE, i, 1, who);
	return bad;
}

static bool in_area(void)
{
	__u64 pfn = pfn_of(t.mem);

	return pfns_in(t.area, &pfn, 1);
}

static void set_pool(struct __test_metadata *_metadata, long n)
{
	write_number(POOL_1G "nr_hugepages", n);
	ASSERT_EQ(n, pool_value(POOL_1G, "nr_hugepages"));
}

FIXTURE(cma_hugetlb) {
};

/* The pool of smaller pages would be in the way of those to come. */
FIXTURE_SETUP(cma_hugetlb)
{
	t.memfd = -1;
	t.pages = value_of(AREA "count", "");
	t.area.start = value_of(AREA "base_pfn", "");
	t.area.end = t.area.start + t.pages;
	t.pool_2m = pool_value(POOL_2M, "nr_hugepages");
	if (t.pages <= 0)
		SKIP(LEAVE_SETUP, "no CMA area: boot with hugetlb_cma=");
	write_number(POOL_2M "nr_hugepages", 0);
	ASSERT_EQ(0, value_of(AREA "used", ""));
	ASSERT_EQ(0, pool_value(POOL_1G, "nr_hugepages"));
	t.before = read_books();
	set_pool(_metadata, 1);
	EXPECT_EQ(t.pages, value_of(AREA "used", ""));
	t.memfd = new_memfd(&hugetlb_1g, GIB);
	ASSERT_LE(0, t.memfd);
	t.mem = mmap(NULL, GIB, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, t.memfd, 0);
	ASSERT_NE(MAP_FAILED, t.mem);
}

FIXTURE_TEARDOWN(cma_hugetlb)
{
	if (t.mem)
		munmap(t.mem, GIB);
	close(t.memfd);
	/* A page that is still held goes back into the area only now. */
	write_number(POOL_1G "nr_hugepages", 0);
	for (int tries = 0; tries < 100 && value_of(AREA "used", ""); tries++) {
		usleep(10000);
		write_number(POOL_1G "nr_hugepages", 0);
	}
	EXPECT_EQ(0, value_of(AREA "used", ""));
	EXPECT_SAME_BOOKS(t.before);
	write_number(POOL_2M "nr_hugepages", t.pool_2m);
}

/* The pool gives back what is free in it. If that is the page of the area, the area is empty. */
static void check_area_is_free(struct __test_metadata *_metadata)
{
	EXPECT_EQ(1, pool_value(POOL_1G, "free_hugepages"));
	write_number(POOL_1G "nr_hugepages", 1);
	EXPECT_EQ(0, value_of(AREA "used", ""));
	EXPECT_TRUE(write_number(AREA "alloc", t.pages));
	EXPECT_EQ(t.pages, value_of(AREA "used", ""));
	write_number(AREA "free", t.pages);
	EXPECT_EQ(0, value_of(AREA "used", ""));
}

static void check_buffer(struct __test_metadata *_metadata, int buffer)
{
	char *map;

	ASSERT_LE(0, buffer);
	EXPECT_EQ(0, wrong_of_some(t.mem, 1000));
	EXPECT_FALSE(in_area());
	map = map_buffer(&hugetlb_1g, buffer, GIB, PROT_READ | PROT_WRITE);
	EXPECT_NE(NULL, map);
	check_area_is_free(_metadata);
	if (map) {
		EXPECT_EQ(0, wrong_of_some(map, 1000));
		stamp_some(map, 1001);
		EXPECT_EQ(0, wrong_of_some(t.mem, 1001));
		munmap(map, GIB);
	}
	close(buffer);
}

TEST_F(cma_hugetlb, moves_out)
{
	stamp_some(t.mem, 1000);
	ASSERT_TRUE(in_area());
	set_pool(_metadata, 2);
	check_buffer(_metadata, create(t.memfd, 0, GIB));
}

/* One page of the folio is enough for all of it to have to move. */
TEST_F(cma_hugetlb, moves_out_for_one_page)
{
	int buffer;

	stamp_some(t.mem, 1000);
	ASSERT_TRUE(in_area());
	set_pool(_metadata, 2);
	buffer = create(t.memfd, GIB / 2, PAGE);
	ASSERT_LE(0, buffer);
	EXPECT_EQ(0, wrong_of_some(t.mem, 1000));
	EXPECT_FALSE(in_area());
	check_area_is_free(_metadata);
	close(buffer);
}

TEST_F(cma_hugetlb, stays_where_there_is_no_other_page)
{
	stamp_some(t.mem, 1000);
	ASSERT_TRUE(in_area());
	ASSERT_TRUE(start_trace(ATTEMPT_EVENT, getpid()));
	EXPECT_EQ(-ENOMEM, create(t.memfd, 0, GIB));
	/* To try again would not bring one. */
	EXPECT_EQ(1, traced(ATTEMPT, NULL));
	end_trace();
	EXPECT_EQ(t.before.pins, pins());
	EXPECT_EQ(0, wrong_of_some(t.mem, 1000));
	EXPECT_TRUE(in_area());
	EXPECT_EQ(0, pool_value(POOL_1G, "free_hugepages"));
	EXPECT_EQ(0, pool_value(POOL_1G, "resv_hugepages"));
	/* Nothing is left behind that would keep it there. */
	set_pool(_metadata, 2);
	check_buffer(_metadata, create(t.memfd, 0, GIB));
}

/*
 * A hole takes a page of the area only where there is no other; it can be pinned when there is one
 * to which that can move.
 */
TEST_F(cma_hugetlb, hole)
{
	int buffer;

	/*
	 * As a write fault would, it takes the page that is there, which then cannot move out. The
	 * memfd_pin_folios() that newer kernels come with leaves it alone.
	 */
	EXPECT_EQ(-ENOMEM, create(t.memfd, 0, GIB));
	EXPECT_EQ(kernel_is(6, 2), pool_value(POOL_1G, "free_hugepages"));
	EXPECT_EQ(0, pool_value(POOL_1G, "resv_hugepages"));
	set_pool(_metadata, 2);
	buffer = create(t.memfd, 0, GIB);
	ASSERT_LE(0, buffer);
	stamp_some(t.mem, 1000);
	check_buffer(_metadata, buffer);
}

TEST_HARNESS_MAIN
