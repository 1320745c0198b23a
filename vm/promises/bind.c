// SPDX-License-Identifier: GPL-2.0
/*
 * Promise: memory that a policy binds to a node which has nothing but movable memory can be in a
 * buffer. What is there is moved to another node, what is not there yet is allocated on one; the
 * policy holds for movable memory only, as it does for what the kernel allocates for itself.
 *
 * Who is affected otherwise: whoever has a node of memory that is to be unplugged, as with
 * movable_node, and a program bound to it. It would be refused every buffer, for want of memory,
 * though another node has plenty.
 *
 * How it is looked for: ZONE_MOVABLE cannot begin below 4 GiB, where the first of two nodes is. As
 * all of that node counts as what movablecore= leaves to the kernel, the second node gets nothing
 * else than ZONE_MOVABLE. The policy is that of the file, by mbind(), or that of the task. That it
 * is in force is seen where the memory is that a mapping touches.
 * Of a file on hugetlbfs, the policy is that of its mapping: it holds for page faults only.
 *
 * VM: MEM=4096 SMP=2 NODES=2 APPEND="movablecore=2200M"
 */

#include "moving.h"
#include "policy.h"

#define MOVABLE_NODE (1UL << 1)

static struct {
	const struct kind *kind;
	struct books before;
	struct pfn_range zone;
	size_t size, pages;
	int memfd;
	char *mem;
} t;

FIXTURE(bind) {
};

FIXTURE_VARIANT(bind) {
	const struct kind *kind;
	bool task;			/* whose policy it is: the file's, or the task's */
};

FIXTURE_VARIANT_ADD(bind, shmem) { .kind = &shmem };

FIXTURE_VARIANT_ADD(bind, shmem_thp) { .kind = &shmem_thp };

FIXTURE_VARIANT_ADD(bind, hugetlb) { .kind = &hugetlb };

FIXTURE_VARIANT_ADD(bind, shmem_of_task) { .kind = &shmem, .task = true };

FIXTURE_VARIANT_ADD(bind, shmem_thp_of_task) { .kind = &shmem_thp, .task = true };

FIXTURE_VARIANT_ADD(bind, hugetlb_of_task) { .kind = &hugetlb, .task = true };

FIXTURE_SETUP(bind)
{
	t.kind = variant->kind;
	t.size = 16 * MIB;
	t.pages = t.size / PAGE;
	t.zone = zone_movable();
	t.memfd = -1;
	t.before = read_books();
	if (strcmp(read_word(NODES "has_memory"), "0-1") ||
	    strcmp(read_word(NODES "has_normal_memory"), "0"))
		SKIP(return, "no node that has movable memory only");
	t.memfd = new_memfd(t.kind, t.size);
	ASSERT_LE(0, t.memfd);
	t.mem = map_fd(t.memfd, t.size, PROT_READ | PROT_WRITE);
	ASSERT_NE(NULL, t.mem);
	ASSERT_EQ(0, variant->task ? set_policy_of_task(MPOL_BIND, MOVABLE_NODE) :
		     set_policy_of_memory(t.mem, t.size, MPOL_BIND, MOVABLE_NODE));
}

FIXTURE_TEARDOWN(bind)
{
	set_policy_of_task(MPOL_DEFAULT, 0);
	if (t.mem)
		munmap(t.mem, t.size);
	close(t.memfd);
	EXPECT_SAME_BOOKS(t.before);
	write_file(THP_SETTING, "never");
}

/* All of the memory is in a buffer, outside of ZONE_MOVABLE, and has what @who wrote. */
static void check_buffer(struct __test_metadata *_metadata, int buffer, unsigned int who)
{
	char *map;

	ASSERT_LE(0, buffer);
	map = map_buffer(t.kind, buffer, t.size, PROT_READ | PROT_WRITE);
	ASSERT_NE(NULL, map);
	EXPECT_EQ(0, wrong(map, 0, t.pages, who));
	EXPECT_EQ(0, wrong(t.mem, 0, t.pages, who));
	EXPECT_EQ(0, pages_in(t.zone, t.mem, t.size));
	fill(map, 0, t.pages, who + 1);
	EXPECT_EQ(0, wrong(t.mem, 0, t.pages, who + 1));
	munmap(map, t.size);
	close(buffer);
}

TEST_F(bind, hole)
{
	int buffer = create(t.memfd, 0, t.size);

	ASSERT_LE(0, buffer);
	fill(t.mem, 0, t.pages, 1000);
	check_buffer(_metadata, buffer, 1000);
}

TEST_F(bind, what_is_there)
{
	fill(t.mem, 0, t.pages, 1000);
	ASSERT_EQ((long)t.pages, pages_in(t.zone, t.mem, t.size)) TH_LOG("the policy is not kept");
	check_buffer(_metadata, create(t.memfd, 0, t.size), 1000);
}

/* Every other huge page is there. */
TEST_F(bind, holes_in_between)
{
	int buffer;

	for (size_t at = 0; at < t.size; at += 2 * HUGE)
		fill(t.mem + at, at / PAGE, HUGE / PAGE, 1000);
	ASSERT_LT(0, pages_in(t.zone, t.mem, HUGE)) TH_LOG("the policy is not kept");
	buffer = create(t.memfd, 0, t.size);
	ASSERT_LE(0, buffer);
	for (size_t at = HUGE; at < t.size; at += 2 * HUGE)
		fill(t.mem + at, at / PAGE, HUGE / PAGE, 1000);
	check_buffer(_metadata, buffer, 1000);
}

TEST_HARNESS_MAIN
