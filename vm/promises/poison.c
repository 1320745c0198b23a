// SPDX-License-Identifier: GPL-2.0
/*
 * Promised: nobody reads or writes, through a buffer, a page that the kernel has taken out of use
 * because its memory has failed. Whoever touches it in a mapping gets SIGBUS, and a debugger an
 * error; that page aside (on hugetlb: that huge page), the buffer goes on to work.
 *
 * A user would notice the opposite as a machine that stops, for a page that was known to be bad.
 *
 * So: have the kernel believe that a page of a buffer has failed, before anybody has touched it
 * there, and look at it and at what is around it. Afterwards it is told the truth, since it would
 * never use the page again.
 *
 * VM: MEM=2048 SMP=2
 */

#include "bad_page.h"

#define SIZE (4 * HUGE)
#define PAGES (SIZE / PAGE)
#define BAD 700			/* the page that fails, in the second huge page */

static struct {
	const struct kind *kind;
	struct books before;
	int memfd, buffer;
	char *mem, *map;		/* the memfd's view, and the buffer's */
	__u64 pfn;			/* of the page that fails */
} t;

FIXTURE(poison) {
};

FIXTURE_VARIANT(poison) {
	const struct kind *kind;
};

FIXTURE_VARIANT_ADD(poison, shmem) { .kind = &shmem };

FIXTURE_VARIANT_ADD(poison, shmem_thp) { .kind = &shmem_thp };

FIXTURE_VARIANT_ADD(poison, hugetlb) { .kind = &hugetlb };

FIXTURE_SETUP(poison)
{
	t.kind = variant->kind;
	t.memfd = -1;
	t.buffer = -1;
	t.before = read_books();
	t.memfd = new_memfd(t.kind, SIZE);
	ASSERT_LE(0, t.memfd);
	t.mem = map_fd(t.memfd, SIZE, PROT_READ | PROT_WRITE);
	ASSERT_NE(NULL, t.mem);
	fill(t.mem, 0, PAGES, 1000);
	t.buffer = create(t.memfd, 0, SIZE);
	ASSERT_LE(0, t.buffer);
	t.map = map_buffer(t.kind, t.buffer, SIZE, PROT_READ | PROT_WRITE);
	ASSERT_NE(NULL, t.map);

	t.pfn = pfn_of(t.mem + BAD * PAGE);
	ASSERT_NE(PFN_NONE, t.pfn);
	if (t.kind->pool)
		t.pfn -= BAD % (HUGE / PAGE);	/* of a huge page, the head */

	ASSERT_TRUE(inject(t.mem + BAD * PAGE));
}

FIXTURE_TEARDOWN(poison)
{
	if (t.map)
		munmap(t.map, SIZE);
	if (t.mem)
		munmap(t.mem, SIZE);
	close(t.buffer);
	close(t.memfd);
	if (t.pfn)
		EXPECT_TRUE(write_number(UNPOISON, t.pfn));
	EXPECT_SAME_BOOKS(t.before);
}

static bool is_bad(size_t page)
{
	size_t in_folio = t.kind->pool ? HUGE / PAGE : 1;

	return page / in_folio == BAD / in_folio;
}

/* Does touching the page give SIGBUS? */
static bool touch_fails(size_t page, bool write)
{
	volatile char *at = t.map + page * PAGE;
	struct sigaction action = { .sa_handler = catch_sigbus };
	volatile bool failed = true;

	sigaction(SIGBUS, &action, NULL);
	if (!sigsetjmp(on_sigbus, 1)) {
		if (write)
			*at = *at;
		else
			(void)*at;
		failed = false;
	}
	signal(SIGBUS, SIG_DFL);
	return failed;
}

/* How many of all pages, the bad one first, are not as they ought to be. */
static size_t wrong_pages(bool write)
{
	size_t n = !touch_fails(BAD, write);

	for (size_t page = 0; page < PAGES; page++)
		if (is_bad(page) ? !touch_fails(page, write) :
				   touch_fails(page, write) || wrong(t.map + page * PAGE, page, 1, 1000))
			n++;
	return n;
}

TEST_F(poison, read)
{
	EXPECT_EQ(0, wrong_pages(false));
}

TEST_F(poison, write)
{
	EXPECT_EQ(0, wrong_pages(true));
}

/* A fault beside it maps what is around, but not that. */
TEST_F(poison, neighbour_first)
{
	EXPECT_FALSE(touch_fails(0, false));
	EXPECT_FALSE(touch_fails(PAGES - 1, false));
	if (!is_bad(BAD + 1)) {
		EXPECT_FALSE(touch_fails(BAD + 1, false));
		EXPECT_FALSE(touch_fails(BAD - 1, true));
	}
	EXPECT_EQ(0, wrong_pages(false));
}

/* Here the kernel itself would touch it. */
TEST_F(poison, debugger)
{
	int mem = open("/proc/self/mem", O_RDWR | O_CLOEXEC);
	char c;

	ASSERT_LE(0, mem);
	for (size_t page = 0; page < PAGES; page++) {
		ssize_t want = is_bad(page) ? -1 : 1;
		off_t at = (uintptr_t)t.map + page * PAGE;

		ASSERT_EQ(want, pread(mem, &c, 1, at));
		ASSERT_EQ(want, pwrite(mem, &c, 1, at));
	}
	close(mem);
}

/* None is made of the page, nor of anything else in the folio that it is part of. */
TEST_F(poison, another_buffer)
{
	size_t folio = t.kind->page / PAGE;
	int other = create(t.memfd, 0, BAD / folio * folio * PAGE);

	EXPECT_EQ(-EIO, create(t.memfd, 0, SIZE));
	EXPECT_EQ(-EIO, create(t.memfd, BAD * PAGE, PAGE));
	EXPECT_LE(0, other);
	close(other);
}

TEST_HARNESS_MAIN
