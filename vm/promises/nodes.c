// SPDX-License-Identifier: GPL-2.0
/*
 * Promise: what fills a hole is on the node that the policy of the task, or of the file, asks for,
 * wherever the task runs; and once no buffer has it any more, it can be moved to another node, or out
 * of memory that is to be unplugged, as if a write to the memfd had filled the hole.
 *
 * Who is affected otherwise: whoever binds a guest to a node, whose device memory is on another one
 * then, and slow; and whoever unplugs memory, which never ends.
 *
 * How it is looked for: move_pages() tells where pages are, and moves them. All is done from each of
 * two nodes, which have normal memory both, so that nothing is right by chance.
 * Of a file on hugetlbfs, the policy is that of its mapping: it holds for page faults only.
 *
 * VM: MEM=4096 SMP=2 NODES=2
 */

#include "promise.h"
#include "policy.h"

static struct {
	const struct kind *kind;
	struct books before;
	size_t size, pages;
	int memfd;
	char *mem;
} t;

FIXTURE(nodes) {
};

FIXTURE_VARIANT(nodes) {
	const struct kind *kind;
	bool task;			/* whose policy it is: the file's, or the task's */
};

FIXTURE_VARIANT_ADD(nodes, shmem) { .kind = &shmem };

FIXTURE_VARIANT_ADD(nodes, shmem_thp) { .kind = &shmem_thp };

FIXTURE_VARIANT_ADD(nodes, shmem_of_task) { .kind = &shmem, .task = true };

FIXTURE_VARIANT_ADD(nodes, shmem_thp_of_task) { .kind = &shmem_thp, .task = true };

FIXTURE_VARIANT_ADD(nodes, hugetlb_of_task) { .kind = &hugetlb, .task = true };

FIXTURE_SETUP(nodes)
{
	t.kind = variant->kind;
	t.size = 8 * MIB;
	t.pages = t.size / PAGE;
	t.before = read_books();
	ASSERT_STREQ("0-1", read_word(NODES "has_normal_memory"));
}

FIXTURE_TEARDOWN(nodes)
{
	EXPECT_SAME_BOOKS(t.before);
	write_file(THP_SETTING, "never");
}

/* The memfd is bound to the node, and the task, which runs on the other one. */
static void bind_to(struct __test_metadata *_metadata, int node, bool task)
{
	cpu_set_t other;

	CPU_ZERO(&other);
	CPU_SET(!node, &other);
	ASSERT_EQ(0, sched_setaffinity(0, sizeof(other), &other));
	t.memfd = new_memfd(t.kind, t.size);
	ASSERT_LE(0, t.memfd);
	t.mem = map_fd(t.memfd, t.size, PROT_READ | PROT_WRITE);
	ASSERT_NE(NULL, t.mem);
	ASSERT_EQ(0, task ? set_policy_of_task(MPOL_BIND, 1UL << node) :
			    set_policy_of_memory(t.mem, t.size, MPOL_BIND, 1UL << node));
}

static void unbind(void)
{
	set_policy_of_task(MPOL_DEFAULT, 0);
	munmap(t.mem, t.size);
	close(t.memfd);
}

/*
 * How many pages are on the node, once they were moved there if @move says so. A huge page is one
 * page to move_pages().
 */
static size_t pages_on(int node, bool move)
{
	static void *pages[8 * MIB / PAGE];
	static int to[8 * MIB / PAGE], status[8 * MIB / PAGE];
	size_t step = t.kind->page, n = 0, on = 0;

	for (size_t at = 0; at < t.size; at += step, n++) {
		*(volatile char *)(t.mem + at);
		pages[n] = t.mem + at;
		to[n] = node;
		status[n] = -1;
	}
	if (syscall(SYS_move_pages, 0, n, pages, move ? to : NULL, status,
		    move ? MPOL_MF_MOVE_ALL : 0) < 0)
		return 0;
	for (size_t i = 0; i < n; i++)
		on += status[i] == node ? step / PAGE : 0;
	return on;
}

TEST_F(nodes, hole_is_filled_where_the_policy_says)
{
	for (int node = 0; node < 2; node++) {
		int buffer;

		bind_to(_metadata, node, variant->task);
		buffer = create(t.memfd, 0, t.size);
		ASSERT_LE(0, buffer);
		EXPECT_EQ(t.pages, pages_on(node, false));
		close(buffer);
		unbind();
	}
}

TEST_F(nodes, what_filled_a_hole_can_be_moved)
{
	for (int node = 0; node < 2; node++) {
		int buffer, to;

		bind_to(_metadata, node, variant->task);
		buffer = create(t.memfd, 0, t.size);
		ASSERT_LE(0, buffer);
		fill(t.mem, 0, t.pages, 1000);
		close(buffer);
		/* Where the policy does not put them, they are elsewhere together. */
		to = pages_on(0, false) == t.pages ? 1 : 0;
		ASSERT_EQ(0, pages_on(to, false));
		EXPECT_EQ(t.pages, pages_on(to, true));
		EXPECT_EQ(0, wrong(t.mem, 0, t.pages, 1000));
		unbind();
	}
}

TEST_HARNESS_MAIN
