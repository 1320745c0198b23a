// SPDX-License-Identifier: GPL-2.0
/*
 * Promised: the mapping of a buffer can be the memory of a virtual machine, as other memory can.
 *
 * KVM looks up what it maps into a guest by get_user_pages(), and in a mapping of page frames, to
 * which that has no access, by follow_pte(), which has to find a PTE, or one after the fault that
 * KVM makes happen. So: let a guest of a few instructions run in a buffer that nobody has touched,
 * in one that has been touched, and in one that it may only read.
 *
 * VM: MEM=2048 SMP=2
 */

#include "guest.h"

#define SIZE (4 * MIB)

static struct {
	const struct kind *kind;
	struct books before;
	int memfd, buffer;
	char *mem, *map;		/* the memfd's view, and the buffer's */
} t;

/* As increment, without OUTPUT. */
static const unsigned char increment_only[] = {
	0xa0, INPUT & 0xff, INPUT >> 8,
	0xfe, 0xc0,
	0xe6, PORT,
};

FIXTURE(guest) {
};

FIXTURE_VARIANT(guest) {
	const struct kind *kind;
};

FIXTURE_VARIANT_ADD(guest, shmem) { .kind = &shmem };

FIXTURE_VARIANT_ADD(guest, shmem_thp) { .kind = &shmem_thp };

FIXTURE_VARIANT_ADD(guest, hugetlb) { .kind = &hugetlb };

FIXTURE_SETUP(guest)
{
	t.kind = variant->kind;
	t.before = read_books();
	t.memfd = new_memfd(t.kind, SIZE);
	ASSERT_LE(0, t.memfd);
	t.mem = map_fd(t.memfd, SIZE, PROT_READ | PROT_WRITE);
	ASSERT_NE(NULL, t.mem);
	fill(t.mem, 0, SIZE / PAGE, 1000);
	t.buffer = create(t.memfd, 0, SIZE);
	ASSERT_LE(0, t.buffer);
	t.map = map_buffer(t.kind, t.buffer, SIZE, PROT_READ | PROT_WRITE);
	ASSERT_NE(NULL, t.map);
}

FIXTURE_TEARDOWN(guest)
{
	if (t.map)
		munmap(t.map, SIZE);
	if (t.mem)
		munmap(t.mem, SIZE);
	close(t.buffer);
	close(t.memfd);
	EXPECT_SAME_BOOKS(t.before);
}

static int run_guest(struct __test_metadata *_metadata, __u32 flags)
{
	return run_guest_in(_metadata, t.map, SIZE, flags, NULL);
}

/* All but the pages of the guest are as they were, and both views are still of one memory. */
static void check_one_memory(struct __test_metadata *_metadata)
{
	size_t first = OUTPUT / PAGE + 1, n = SIZE / PAGE - first;

	EXPECT_EQ(0, wrong(t.map + first * PAGE, first, n, 1000));
	fill(t.map, 0, SIZE / PAGE, 1001);
	EXPECT_EQ(0, wrong(t.mem, 0, SIZE / PAGE, 1001));
	fill(t.mem, 0, SIZE / PAGE, 1002);
	EXPECT_EQ(0, wrong(t.map, 0, SIZE / PAGE, 1002));
}

TEST_F(guest, in_a_fresh_mapping)
{
	memcpy(t.mem + CODE, increment, sizeof(increment));
	t.mem[INPUT] = 41;
	EXPECT_EQ(42, run_guest(_metadata, 0));
	EXPECT_EQ(42, t.mem[OUTPUT]);
	EXPECT_EQ(42, t.map[OUTPUT]);
	check_one_memory(_metadata);
}

TEST_F(guest, in_a_mapping_in_use)
{
	EXPECT_EQ(0, wrong(t.map, 0, SIZE / PAGE, 1000));
	memcpy(t.map + CODE, increment, sizeof(increment));
	t.map[INPUT] = 41;
	EXPECT_EQ(42, run_guest(_metadata, 0));
	EXPECT_EQ(42, t.mem[OUTPUT]);
	EXPECT_EQ(42, t.map[OUTPUT]);
	check_one_memory(_metadata);
}

TEST_F(guest, read_only_in_a_mapping_in_use)
{
	EXPECT_EQ(0, wrong(t.map, 0, SIZE / PAGE, 1000));
	memcpy(t.map + CODE, increment_only, sizeof(increment_only));
	t.map[INPUT] = 41;
	EXPECT_EQ(42, run_guest(_metadata, KVM_MEM_READONLY));
	check_one_memory(_metadata);
}

/* Its memory changes while it is there: the guest sees what is written, by either view. */
TEST_F(guest, again_and_again)
{
	memcpy(t.map + CODE, increment, sizeof(increment));
	for (int i = 0; i < 100; i++) {
		(i % 2 ? t.map : t.mem)[INPUT] = i;
		EXPECT_EQ(i + 1, run_guest(_metadata, 0));
		EXPECT_EQ(i + 1, t.mem[OUTPUT]);
	}
	check_one_memory(_metadata);
}

TEST_HARNESS_MAIN
