// SPDX-License-Identifier: GPL-2.0
/*
 * Promise: when memory runs out, at any point of a buffer's life, the call that needed it fails
 * with ENOMEM and leaves nothing behind, or works without it; and works the next time.
 *
 * How a user would notice: a machine that is short of memory for a moment, such as in a memory
 * cgroup of its own, loses pages, huge pages or reservations for good, or its memory can never be
 * moved or sealed again, because of a call that failed.
 *
 * How this looks: a sequence of calls that works is run with the first allocation in the kernel
 * failing, then with the second, and so on, until a run has met no failure. CONFIG_FAULT_INJECTION
 * counts the allocations of one task (fail-nth). After each run:
 * - the calls gave ENOMEM, or the sequence as a whole worked;
 * - no page of the memfds is held by anybody: each can be sealed against writes, which looks at
 *   the reference count of each of its pages; no pin is left, although the memory is still there;
 * - what the memory contained it still contains;
 * - the same sequence works;
 * - pins, huge pages, reservations, descriptors and the memory of shmem are what they were.
 * What is allocated and not given back, and has no counter, is left to kmemleak on the debug
 * kernel: the slab allocator always has more in motion than one call can lose.
 *
 * Not looked for: two allocations that fail in one run; allocations in other tasks (kworkers).
 *
 * What allocates nothing cannot fail, and so it is looked at that it does not: letting go of a
 * buffer, and access by the CPU, also where the DMA API has to do something (swiotlb=force).
 * Debugging of DMA would allocate, and end itself where that fails, so it is off.
 *
 * A kernel that checks itself keeps stacks, for which it takes memory now and then: not here.
 *
 * VM: MEM=4096 SMP=2 DEVICES=edu
 * VM: APPEND="movablecore=1G swiotlb=force dma_debug=off stack_depot_disable=on"
 */

#include "promise.h"
#include "drm.h"
#include "edu.h"

#define FAILSLAB "/sys/kernel/debug/failslab/"
#define FAIL_PAGE_ALLOC "/sys/kernel/debug/fail_page_alloc/"

/* No sequence makes so many allocations: one that never ends is a failure, and ends. */
#define MOST_FAULTS 4000

static struct setting {
	const char *path, *wanted;
	char saved[16];
} settings[] = {
	{ FAILSLAB "ignore-gfp-wait", "N", "" },
	{ FAILSLAB "verbose", "0", "" },
	{ FAIL_PAGE_ALLOC "ignore-gfp-wait", "N", "" },
	{ FAIL_PAGE_ALLOC "ignore-gfp-highmem", "N", "" },
	{ FAIL_PAGE_ALLOC "min-order", "0", "" },
	{ FAIL_PAGE_ALLOC "verbose", "0", "" },
	{ POOL_2M "nr_overcommit_hugepages", NULL, "" },
	{ POOL_2M "nr_hugepages", NULL, "" },
};

static long *injected;			/* in all; shared by all cases */

static void finish(void)
{
	for (unsigned int i = 0; i < ARRAY_SIZE(settings); i++)
		write_file(settings[i].path, settings[i].saved);
	printf("# %ld faults injected in all\n", *injected);
}

/* main() is the harness's. Its children leave by _exit(), so atexit() acts once. */
static void __attribute__((constructor)) prepare(void)
{
	injected = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	for (unsigned int i = 0; i < ARRAY_SIZE(settings); i++) {
		snprintf(settings[i].saved, sizeof(settings[i].saved), "%.15s",
			 read_word(settings[i].path));
		if (settings[i].wanted)
			write_file(settings[i].path, settings[i].wanted);
	}
	atexit(finish);
}

/* Fails the @nth allocation of this task from here on. */
static int fail_nth = -1;

static void arm(unsigned int nth)
{
	char text[16];
	int len = snprintf(text, sizeof(text), "%u", nth);

	if (pwrite(fail_nth, text, len, 0) != len)
		abort();
}

/* Did it come to that? */
static bool disarm(void)
{
	char text[16] = "";
	bool hit;

	if (pread(fail_nth, text, sizeof(text) - 1, 0) <= 0)
		abort();
	hit = !strtoul(text, NULL, 10);
	arm(0);
	return hit;
}

/* The memory that a sequence works on, and what it has before the first fault */

#define MEMFDS 3

struct stage {
	const struct kind *kind;
	size_t size;
	int dev, vgem, edu;
	struct screen screen;
	int nr;				/* how many memfds */
	int memfds[MEMFDS];
	size_t sizes[MEMFDS];
	char *mems[MEMFDS];		/* NULL: not mapped, and with a hole from end to end */
	int buffer;
	long handle, fb;
	struct pfn_range movable;
};

struct sequence {
	const char *name;
	/* Makes memory and what else there has to be. */
	bool (*prepare)(struct stage *s);
	/* Does all of it and ends it again. Returns 0 or the first error. */
	int (*run)(struct stage *s);
};

/* What a buffer of one kind covers: not so many pages that it takes long, nor just one folio. */
static size_t size_of(const struct kind *kind)
{
	return kind->page == PAGE ? 24 * PAGE : 2 * kind->page;
}

static bool add_memfd(struct stage *s, const struct kind *kind, bool filled)
{
	int i = s->nr;
	size_t size = size_of(kind);

	s->memfds[i] = new_memfd(kind, size);
	if (s->memfds[i] < 0)
		return false;
	s->sizes[i] = size;
	s->mems[i] = NULL;
	s->nr++;
	if (filled) {
		s->mems[i] = map_fd(s->memfds[i], size, PROT_READ | PROT_WRITE);
		if (!s->mems[i])
			return false;
		fill(s->mems[i], 0, size / PAGE, i);
	}
	return true;
}

static int create_whole(struct stage *s)
{
	return create_at(s->dev, s->memfds[0], 0, s->sizes[0]);
}

/* Only one allocation fails: that of another try does not. */
static void unmap(char *map, size_t size)
{
	if (munmap(map, size) && munmap(map, size))
		abort();
}

/* create: memory that is there */

static bool prepare_filled(struct stage *s)
{
	return add_memfd(s, s->kind, true);
}

static int run_create(struct stage *s)
{
	int buffer = create_whole(s);

	if (buffer < 0)
		return buffer;
	close(buffer);
	return 0;
}

static const struct sequence create_filled = { "create", prepare_filled, run_create };

/* create over holes. A hole that was filled stays so: each run has a new one. */

static bool prepare_hole(struct stage *s)
{
	return add_memfd(s, s->kind, false);
}

static const struct sequence create_hole = { "create over holes", prepare_hole, run_create };

/* The same where a mapping has reserved huge pages for the whole file. */

static bool prepare_reserved(struct stage *s)
{
	if (!add_memfd(s, s->kind, false))
		return false;
	s->mems[0] = map_fd(s->memfds[0], s->sizes[0], PROT_READ | PROT_WRITE);
	return s->mems[0];
}

static const struct sequence create_reserved = {
	"create over a reserved hole", prepare_reserved, run_create
};

/* A page here and there, in a hole, with a memfd of each kind: many runs. */

static bool prepare_mixed(struct stage *s)
{
	return add_memfd(s, &shmem, s->kind != &shmem) &&
	       add_memfd(s, &shmem_thp, s->kind != &shmem_thp) &&
	       add_memfd(s, &hugetlb, s->kind != &hugetlb);
}

#define ITEMS 11

static int run_list(struct stage *s)
{
	struct {
		struct udmabuf_create_list head;
		struct udmabuf_create_item items[ITEMS];
	} arg = { .head = { .flags = UDMABUF_FLAGS_CLOEXEC, .count = ITEMS } };
	int buffer;

	for (int i = 0; i < ITEMS; i++) {
		arg.items[i].memfd = s->memfds[i % MEMFDS];
		arg.items[i].offset = i * PAGE;
		arg.items[i].size = (1 + i % 5) * PAGE;
	}
	buffer = ioctl(s->dev, UDMABUF_CREATE_LIST, &arg);
	if (buffer < 0)
		return -errno;
	close(buffer);
	return 0;
}

static const struct sequence create_pieces = { "create list", prepare_mixed, run_list };

/* mmap and touch: a page table in each 2 MiB */

static bool prepare_buffer(struct stage *s)
{
	if (!prepare_filled(s))
		return false;
	s->buffer = create_whole(s);
	/* Else touching what is mapped would be the end of this machine. */
	return s->buffer >= 0 && (!s->kind->pool || maps_frames(s->buffer));
}

static int run_mmap(struct stage *s)
{
	char *map = mmap(NULL, s->sizes[0], PROT_READ | PROT_WRITE, MAP_SHARED, s->buffer, 0);
	int ret = 0;

	if (map == MAP_FAILED)
		return -errno;
	/* The fault that finds no memory is tried again, without a word. */
	for (size_t at = 0; at < s->sizes[0]; at += PAGE)
		if (*stamp_of(map + at, at / PAGE) != stamp(0, at / PAGE))
			ret = -EILSEQ;
	unmap(map, s->sizes[0]);
	return ret;
}

static const struct sequence mmap_touch = { "mmap, touch", prepare_buffer, run_mmap };

/* Access by the CPU, the first one of a buffer */

static bool prepare_fresh(struct stage *s)
{
	if (!prepare_filled(s))
		return false;
	s->buffer = create_whole(s);
	return s->buffer >= 0;
}

static int run_sync(struct stage *s)
{
	int ret = sync_buffer(s->buffer, DMA_BUF_SYNC_START | DMA_BUF_SYNC_RW);

	if (ret)
		return ret;
	return sync_buffer(s->buffer, DMA_BUF_SYNC_END | DMA_BUF_SYNC_RW);
}

static bool prepare_attached(struct stage *s)
{
	return prepare_fresh(s) && !edu_attach_and_map(s->edu, s->buffer, EDU_BIDIRECTIONAL);
}

static const struct sequence sync_alone = { "sync", prepare_fresh, run_sync };
static const struct sequence sync_attached = { "sync of a device", prepare_attached, run_sync };

/* attach and map, through vgem */

static int run_import(struct stage *s)
{
	__u64 offset = drm_next_offset(s->vgem, s->sizes[0]);
	long handle;
	char *map;
	int ret = 0;

	/* This allocates, too, in the driver's part. */
	if (!offset)
		return -ENOMEM;
	handle = drm_import(s->vgem, s->buffer);
	if (handle < 0)
		return handle;
	map = mmap(NULL, s->sizes[0], PROT_READ | PROT_WRITE, MAP_SHARED, s->vgem, offset);
	if (map == MAP_FAILED) {
		ret = -errno;
	} else {
		for (size_t at = 0; at < s->sizes[0]; at += PAGE)
			if (*stamp_of(map + at, at / PAGE) != stamp(0, at / PAGE))
				ret = -EILSEQ;
		unmap(map, s->sizes[0]);
	}
	drm_close_handle(s->vgem, handle);
	return ret;
}

static const struct sequence import_map = { "import, mmap, touch", prepare_buffer, run_import };

/* attach and map for a device */

static int run_device(struct stage *s)
{
	int ret = edu_attach_and_map(s->edu, s->buffer, EDU_BIDIRECTIONAL);

	edu_detach(s->edu);
	return ret;
}

static const struct sequence map_for_device = { "map for a device", prepare_buffer, run_device };

/* vmap, through vkms */

static bool prepare_screen(struct stage *s)
{
	if (!prepare_fresh(s) || !screen_open(&s->screen))
		return false;
	s->handle = drm_import(s->screen.drm, s->buffer);
	s->fb = s->handle > 0 ? screen_add(&s->screen, s->handle, MIN_LINES) : -1;
	return s->fb > 0;
}

static int run_vmap(struct stage *s)
{
	int ret = screen_on(&s->screen, s->fb, MIN_LINES);

	/* Without memory, it stays on: then off goes the second time. */
	if (screen_off(&s->screen) && screen_off(&s->screen))
		return -EILSEQ;
	return ret;
}

static const struct sequence vmap_screen = { "vmap", prepare_screen, run_vmap };

/* The last user goes: nothing of this may fail. */

static bool prepare_used(struct stage *s)
{
	char *map;

	if (!prepare_buffer(s))
		return false;
	map = mmap(NULL, s->sizes[0], PROT_READ | PROT_WRITE, MAP_SHARED, s->buffer, 0);
	if (map == MAP_FAILED)
		return false;
	fill(map, 0, s->sizes[0] / PAGE, 0);
	munmap(map, s->sizes[0]);
	return !run_sync(s) && !edu_attach_and_map(s->edu, s->buffer, EDU_BIDIRECTIONAL);
}

static int run_release(struct stage *s)
{
	if (s->buffer >= 0) {
		close(s->buffer);
		close(s->edu);
		s->buffer = s->edu = -1;
	}
	return 0;
}

static const struct sequence release = { "release", prepare_used, run_release };

/* Memory that has to be migrated first */

static bool prepare_movable(struct stage *s)
{
	/* Huge pages that were migrated stay in the pool, where they came to be: have new ones. */
	if (s->kind->pool) {
		long nr = pool_value(s->kind->pool, "nr_hugepages");

		write_number(POOL_2M "nr_hugepages", 0);
		write_number(POOL_2M "nr_hugepages", nr);
	}
	return prepare_filled(s) && pages_in(s->movable, s->mems[0], s->sizes[0]) > 0;
}

static const struct sequence create_movable = {
	"create over movable memory", prepare_movable, run_create
};

/* Memory that has been swapped out, as much as is used: a huge page is split for it. */

#define SWAPPED (24 * PAGE)

static bool prepare_swapped(struct stage *s)
{
	char *mem;

	if (!prepare_filled(s))
		return false;
	mem = s->mems[0];
	for (int tries = 0; tries < 20; tries++) {
		bool out = true;

		madvise(mem, SWAPPED, MADV_PAGEOUT);
		for (size_t at = 0; at < SWAPPED; at += PAGE)
			out &= pfn_of(mem + at) == PFN_NONE;
		if (out)
			return true;
		/* A page may wait in the batch of another CPU, which this empties. */
		write_file("/proc/sys/vm/compact_memory", "1");
	}
	return false;
}

static int run_create_some(struct stage *s)
{
	int buffer = create_at(s->dev, s->memfds[0], 0, SWAPPED);

	if (buffer < 0)
		return buffer;
	close(buffer);
	return 0;
}

static const struct sequence create_swapped = {
	"create over swapped memory", prepare_swapped, run_create_some
};

static bool open_stage(struct stage *s, const struct kind *kind, const struct sequence *sequence)
{
	*s = (struct stage) {
		.kind = kind, .buffer = -1, .screen.drm = -1,
		.dev = open("/dev/udmabuf", O_RDWR | O_CLOEXEC), .vgem = drm_open("vgem", NULL),
		.edu = edu_open(0), .movable = zone_movable(),
	};
	return s->dev >= 0 && s->vgem >= 0 && s->edu >= 0 && sequence->prepare(s);
}

/* Ends all but the memory. */
static void leave_stage(struct stage *s)
{
	if (s->screen.drm >= 0)
		close(s->screen.drm);
	if (s->buffer >= 0)
		close(s->buffer);
	if (s->vgem >= 0)
		close(s->vgem);
	if (s->edu >= 0)
		close(s->edu);
	close(s->dev);
}

/* Ends the memory. Returns how many memfds have pages that somebody holds on to. */
static int close_stage(struct stage *s)
{
	int held = 0;

	for (int i = 0; i < s->nr; i++) {
		if (s->mems[i])
			munmap(s->mems[i], s->sizes[i]);
		held += fcntl(s->memfds[i], F_ADD_SEALS, F_SEAL_WRITE) != 0;
		close(s->memfds[i]);
	}
	return held;
}

static long wrong_pages(struct stage *s, const struct sequence *sequence)
{
	long bad = 0;

	for (int i = 0; i < s->nr; i++)
		if (s->mems[i] && sequence != &create_reserved)
			bad += wrong(s->mems[i], 0, s->sizes[i] / PAGE, i);
	return bad;
}

/* What shmem has of memory, in kB. It is exact once read_books() has been called. */
static long shmem_kb(void)
{
	return value_of("/proc/meminfo", "Shmem:");
}

#define SKIP_WITHOUT_FAULTS() do { \
	fail_nth = open("/proc/thread-self/fail-nth", O_RDWR | O_CLOEXEC); \
	if (fail_nth < 0 || access(FAILSLAB, F_OK) || access(FAIL_PAGE_ALLOC, F_OK)) \
		SKIP(return, "no fail-nth in this kernel"); \
} while (0)

/*
 * Huge pages are made in ZONE_MOVABLE first, and a hole is not filled with one of these. Those that
 * were migrated once are outside, and the first to be taken again.
 */
static void use_pinnable_huge_pages(void)
{
	int memfd = new_memfd(&hugetlb, 8 * HUGE);
	char *mem = map_fd(memfd, 8 * HUGE, PROT_READ | PROT_WRITE);

	fill(mem, 0, 8 * HUGE / PAGE, 0);
	close(create(memfd, 0, 8 * HUGE));
	munmap(mem, 8 * HUGE);
	close(memfd);
}

static void sweep(struct __test_metadata *_metadata, const struct kind *kind,
		  const struct sequence *sequence)
{
	struct books before;
	long faults = 0, failed = 0, shmem_before;
	unsigned int nth;
	bool hit = true;

	SKIP_WITHOUT_FAULTS();
	use_pinnable_huge_pages();
	write_number(PARAMETERS "size_limit_mb", 64);
	/* The first has what later ones find made: caches, page tables, nodes of trees. */
	for (nth = 0; hit && nth <= MOST_FAULTS && PASSED(_metadata); nth++) {
		long pins_before;
		struct stage s;
		int ret;

		before = read_books();
		shmem_before = shmem_kb();
		pins_before = before.pins;
		ASSERT_TRUE(open_stage(&s, kind, sequence));
		if (s.buffer >= 0)
			pins_before = pins();

		arm(nth);
		ret = sequence->run(&s);
		/* The first run is to see that it works. */
		hit = disarm() || !nth;
		if (hit && nth) {
			faults++;
			if (ret) {
				failed++;
				EXPECT_EQ(-ENOMEM, ret);
			}
		} else {
			EXPECT_EQ(0, ret);
		}
		EXPECT_EQ(pins_before, pins());
		EXPECT_EQ(0, wrong_pages(&s, sequence));
		EXPECT_EQ(0, sequence->run(&s));
		leave_stage(&s);
		EXPECT_EQ(before.pins, pins());
		EXPECT_EQ(0, wrong_pages(&s, sequence));
		EXPECT_EQ(0, close_stage(&s));
		EXPECT_SAME_BOOKS(before);
		EXPECT_EQ(shmem_before, shmem_kb());
		if (!PASSED(_metadata))
			TH_LOG("%s: with fault %u, the result was %d", sequence->name, nth, ret);
	}
	EXPECT_FALSE(hit);
	EXPECT_LT(0, faults) TH_LOG("nothing was allocated that could fail");
	*injected += faults;
	printf("# %s, %s: %ld faults, %ld of them fatal to it\n", sequence->name, kind->name, faults,
	       failed);
}

/*
 * dma_buf_vmap() itself says once, by a WARNING, that a driver's vmap failed, whatever the errno.
 * That is no bug of the driver.
 */
static void sweep_vmap(struct __test_metadata *_metadata, const struct kind *kind)
{
	quiet_kernel();
	sweep(_metadata, kind, &vmap_screen);
	EXPECT_EQ(0, complaints_but("dma_buf_vmap"));
}

static void check_allocates_nothing(struct __test_metadata *_metadata, const struct kind *kind,
				    const struct sequence *sequence)
{
	struct books before;
	struct stage s;
	int ret;

	SKIP_WITHOUT_FAULTS();
	write_number(PARAMETERS "size_limit_mb", 64);
	before = read_books();
	ASSERT_TRUE(open_stage(&s, kind, sequence));
	/* Twice: the second time might find what the first has made. */
	for (int i = 0; i < 2; i++) {
		arm(1);
		ret = sequence->run(&s);
		EXPECT_FALSE(disarm());
		EXPECT_EQ(0, ret);
	}
	leave_stage(&s);
	EXPECT_EQ(0, wrong_pages(&s, sequence));
	EXPECT_EQ(0, close_stage(&s));
	EXPECT_SAME_BOOKS(before);
}

#define ALLOCATES_NOTHING(sequence, kind) \
	TEST(sequence##_##kind##_allocates_nothing) \
	{ \
		check_allocates_nothing(_metadata, &kind, &sequence); \
	}

#define ALLOCATES_NOTHING_ALL(sequence) \
	ALLOCATES_NOTHING(sequence, shmem) \
	ALLOCATES_NOTHING(sequence, shmem_thp) \
	ALLOCATES_NOTHING(sequence, hugetlb)

#define SWEEP(sequence, kind) \
	TEST(sequence##_##kind) \
	{ \
		sweep(_metadata, &kind, &sequence); \
	}

#define SWEEP_ALL(sequence) \
	SWEEP(sequence, shmem) \
	SWEEP(sequence, shmem_thp) \
	SWEEP(sequence, hugetlb)

#define SWEEP_VMAP(kind) \
	TEST(vmap_screen_##kind) \
	{ \
		sweep_vmap(_metadata, &kind); \
	}

SWEEP_ALL(create_filled)
SWEEP_ALL(create_hole)
SWEEP_ALL(create_pieces)
SWEEP_ALL(mmap_touch)
SWEEP_ALL(import_map)
SWEEP_ALL(map_for_device)
SWEEP_VMAP(shmem)
SWEEP_VMAP(shmem_thp)
SWEEP_VMAP(hugetlb)
SWEEP_ALL(create_movable)
SWEEP(create_swapped, shmem)
SWEEP(create_swapped, shmem_thp)
SWEEP(create_reserved, hugetlb)
ALLOCATES_NOTHING_ALL(release)
ALLOCATES_NOTHING_ALL(sync_alone)
ALLOCATES_NOTHING_ALL(sync_attached)

TEST_HARNESS_MAIN
