// SPDX-License-Identifier: GPL-2.0
/*
 * Promise: whatever else happens to the memory, the file or the buffer at the same moment, a
 * buffer is made as if it had happened before or after, or is refused with the errno that this
 * documents. Nothing is lost: no content, no page, no pin, no huge page, no reservation.
 *
 * Who is affected otherwise: whoever runs more than one thread. A device that reads other memory
 * than the program wrote, a sealed memfd that changes, a pool of huge pages that shrinks by one
 * page a day, memory that cannot be unplugged.
 *
 * How it is looked for: each case is a race of two, or more, for a number of rounds. A round has
 * a memfd of its own. Its rival acts at a moment that is drawn at random from the time that a
 * create takes, so that all orders are met. Where it can be told which one was, a case in which
 * another never came true fails, because it has not raced. Each round ends with the content, stamp
 * by stamp, through both views, and each case with the books. What a racing call may return is
 * listed where it is called.
 *
 * Memory that a program touches is in ZONE_MOVABLE here, on the second of two nodes, so that the
 * creates migrate, too. Where the rival works in rounds of its own, a case tells how often.
 *
 * With swiotlb=force, the DMA API has something to do when access by the CPU begins and ends, while
 * the buffer is attached to a device.
 *
 * VM: MEM=4096 SMP=2 NODES=2 APPEND="movablecore=1G swiotlb=force" DEVICES="edu edu"
 */

#include "promise.h"
#include "edu.h"
#include "policy.h"
#include "trace.h"

#include <poll.h>
#include <time.h>

#define SEED 20230611

#define MOST_PAGES (24 * MIB / PAGE)

static struct {
	const struct kind *kind;
	struct books before;
	size_t size, pages;		/* of the memfd */
	int dev, memfd;
	char *mem;			/* its mapping */
	unsigned int who;		/* wrote the stamps of this round */
	int round;
	size_t at, len;			/* what the rival is to work on */
	int buffer, result;		/* what create and the rival returned */
} t;

/* What @result, a descriptor or a negative errno, may be. */
static bool is_allowed(int result, const int *allowed)
{
	if (result > 0)
		result = 0;
	for (; *allowed <= 0; allowed++)
		if (result == *allowed)
			return true;
	return false;
}

#define EXPECT_ALLOWED(result, ...) \
	EXPECT_TRUE(is_allowed(result, (const int []) { __VA_ARGS__, 1 })) \
		TH_LOG("round %d: %s is %d", t.round, #result, (int)(result))

/* Zones: where memory must not be once it is pinned */

static struct pfn_range movable[8];

static void find_movable(void)
{
	FILE *f = fopen("/proc/zoneinfo", "re");
	struct pfn_range *zone = movable;
	__u64 value, spanned = 0;
	bool here = false;
	char line[256];

	memset(movable, 0, sizeof(movable));
	while (f && fgets(line, sizeof(line), f)) {
		if (!strncmp(line, "Node", 4)) {
			here = strstr(line, "zone  Movable");
		} else if (here && sscanf(line, " spanned %llu", &value) == 1) {
			spanned = value;
		} else if (here && sscanf(line, " start_pfn: %llu", &value) == 1 && spanned &&
			   zone < movable + ARRAY_SIZE(movable)) {
			zone->start = value;
			zone++->end = value + spanned;
		}
	}
	if (f)
		fclose(f);
}

static bool is_movable(__u64 pfn)
{
	for (size_t i = 0; i < ARRAY_SIZE(movable); i++)
		if (pfn >= movable[i].start && pfn < movable[i].end)
			return true;
	return false;
}

/* How many of the first pages of the memfd, which its mapping has touched, are in ZONE_MOVABLE. */
static long movable_among(size_t pages)
{
	static __u64 pfns[MOST_PAGES];
	long n = 0;

	if (!read_pfns(t.mem, pages, pfns))
		return -1;
	for (size_t i = 0; i < pages; i++)
		n += is_movable(pfns[i]);
	return n;
}

static long movable_pages(void)
{
	return movable_among(t.pages);
}

/*
 * ZONE_MOVABLE is all on the second node, so that the first has the huge pages that holes can be
 * filled with. Memory that is touched comes from the second, if it is preferred.
 */
static void prefer_movable(bool prefer)
{
	if (prefer)
		set_policy_of_task(MPOL_PREFERRED, 1UL << 1);
	else
		set_policy_of_task(MPOL_DEFAULT, 0);
}

/* Blocks of memory that can be taken offline */

#define BLOCKS "/sys/devices/system/memory/"
#define MOST_BLOCKS 8

static struct {
	int nr[MOST_BLOCKS], n;
	int failed, error;		/* of the last offline_blocks() */
	atomic_bool done;
} blocks;

static const char *block_file(int nr, const char *name)
{
	static __thread char path[128];

	snprintf(path, sizeof(path), BLOCKS "memory%d/%s", nr, name);
	return path;
}

/* Adds those blocks to the list that are in a zone of movable memory, and nothing else. */
static void find_blocks(const struct pfn_range *zone)
{
	unsigned long size = strtoul(read_word(BLOCKS "block_size_bytes"), NULL, 16) / PAGE;

	for (__u64 nr = zone->start / size; nr * size < zone->end; nr++)
		if (blocks.n < MOST_BLOCKS &&
		    !strcmp(read_word(block_file(nr, "valid_zones")), "Movable"))
			blocks.nr[blocks.n++] = nr;
}

static void offline_blocks(void)
{
	blocks.failed = 0;
	for (int i = 0; i < blocks.n; i++)
		if (!write_file(block_file(blocks.nr[i], "state"), "offline")) {
			blocks.failed++;
			blocks.error = -errno;
		}
}

static int online_blocks(void)
{
	int failed = 0;

	for (int i = 0; i < blocks.n; i++)
		if (strcmp(read_word(block_file(blocks.nr[i], "state")), "online"))
			failed += !write_file(block_file(blocks.nr[i], "state"), "online_movable");
	return failed;
}

static void use_cpu(int cpu)
{
	cpu_set_t cpus;

	CPU_ZERO(&cpus);
	CPU_SET(cpu, &cpus);
	sched_setaffinity(0, sizeof(cpus), &cpus);
}

static void wait_until(atomic_int *what, int value)
{
	for (unsigned int spins = 0; atomic_load(what) < value; spins++)
		if (spins > 3000)
			usleep(20);
}

/* The two that race */

static struct {
	void (*act)(void);
	pthread_t thread;
	atomic_int ready, go, done;	/* the round that it has got to */
	atomic_bool end;
	atomic_bool over;		/* what it races with, in this round */
	int length;			/* spins that it takes what it races with */
	int hold;			/* spins until it acts, or if negative, the other */
} rival;

static void spin(int n)
{
	for (int i = 0; i < n; i++)
		atomic_load(&rival.over);
}

static void *rival_thread(void *arg)
{
	int length;

	for (int round = 1;; round++) {
		atomic_store(&rival.ready, round);
		wait_until(&rival.go, round);
		if (atomic_load(&rival.end))
			return arg;
		if (rival.act) {
			spin(rival.hold);
			rival.act();
		} else {
			/* Nobody races: find out how long the other takes. */
			for (length = 0; !atomic_load(&rival.over) && length < 10000000; length++)
				;
			/* Whoever had to wait for a CPU meanwhile took longer than usual. */
			if (length && (!rival.length || length < rival.length))
				rival.length = length;
		}
		atomic_store(&rival.done, round);
	}
}

static void start_rival(struct __test_metadata *_metadata)
{
	memset(&rival, 0, sizeof(rival));
	ASSERT_EQ(0, pthread_create(&rival.thread, NULL, rival_thread, NULL));
}

static void end_rival(void)
{
	atomic_store(&rival.end, true);
	atomic_fetch_add(&rival.go, 1);
	pthread_join(rival.thread, NULL);
}

/* Does @mine, which takes its usual time, while the rival acts, and waits until both are done. */
static void race_of(void (*mine)(void), void (*act)(void))
{
	int round = atomic_load(&rival.go) + 1;

	wait_until(&rival.ready, round);
	rival.act = act;
	/* Before, at any time during, and after. */
	rival.hold = rival.length ? random() % (2 * rival.length) - rival.length : 0;
	atomic_store(&rival.over, false);
	atomic_store(&rival.go, round);
	spin(-rival.hold);
	mine();
	atomic_store(&rival.over, true);
	wait_until(&rival.done, round);
}

static void create_whole(void)
{
	t.buffer = create_at(t.dev, t.memfd, 0, t.size);
}

static void race(void (*act)(void))
{
	race_of(create_whole, act);
}

/*
 * Is there one more round after the first @i of @rounds? Where the host is busy, its CPUs take
 * turns, and what is short seldom happens at once. So there are more until all outcomes were @met,
 * but not for ever.
 */
static bool goes_on(int i, int rounds, bool met)
{
	return i < rounds || (!met && i < 20 * rounds);
}

/* Rounds: each on a memfd of its own */

FIXTURE(race) {
};

FIXTURE_VARIANT(race) {
	const struct kind *kind;
};

FIXTURE_VARIANT_ADD(race, shmem) { .kind = &shmem };

FIXTURE_VARIANT_ADD(race, shmem_thp) { .kind = &shmem_thp };

FIXTURE_VARIANT_ADD(race, hugetlb) { .kind = &hugetlb };

static void open_case(struct __test_metadata *_metadata, const struct kind *kind)
{
	srandom(SEED);
	TH_LOG("seed %d", SEED);
	find_movable();
	t.kind = kind;
	t.size = kind->page == PAGE ? 4 * MIB : 8 * MIB;
	t.pages = t.size / PAGE;
	ASSERT_TRUE(movable[0].end != 0) TH_LOG("no ZONE_MOVABLE");
	ASSERT_TRUE(write_number(PARAMETERS "size_limit_mb", 1 << 20));
	t.dev = open("/dev/udmabuf", O_RDWR | O_CLOEXEC);
	ASSERT_GE(t.dev, 0);
	prefer_movable(true);
	t.before = read_books();
}

static void close_case(struct __test_metadata *_metadata)
{
	EXPECT_SAME_BOOKS(t.before);
	write_file(THP_SETTING, "never");
	write_number(PARAMETERS "size_limit_mb", 64);
}

FIXTURE_SETUP(race)
{
	open_case(_metadata, variant->kind);
}

FIXTURE_TEARDOWN(race)
{
	close_case(_metadata);
}

/* Opens a round on memory of which the first @filled bytes are there, and the rest are holes. */
static void open_round(struct __test_metadata *_metadata, size_t filled)
{
	t.round++;
	t.who = 1000 * t.round;
	t.buffer = -1;
	t.memfd = new_memfd(t.kind, t.size);
	ASSERT_GE(t.memfd, 0);
	t.mem = map_fd(t.memfd, t.size, PROT_READ | PROT_WRITE);
	ASSERT_NE(NULL, t.mem);
	fill(t.mem, 0, filled / PAGE, t.who);
}

static void close_round(void)
{
	munmap(t.mem, t.size);
	close(t.memfd);
	if (t.buffer >= 0)
		close(t.buffer);
}

/* The first round tells how long @mine takes, for those that race in the rounds to come. */
static void calibrate_by(struct __test_metadata *_metadata, size_t filled, void (*mine)(void))
{
	start_rival(_metadata);
	for (int i = 0; i < 2; i++) {
		open_round(_metadata, filled);
		race_of(mine, NULL);
		close_round();
	}
	t.round = 0;
}

static void calibrate(struct __test_metadata *_metadata, size_t filled)
{
	calibrate_by(_metadata, filled, create_whole);
}

static char *map_whole(struct __test_metadata *_metadata, int buffer)
{
	char *map = map_buffer(t.kind, buffer, t.size, PROT_READ | PROT_WRITE);

	ASSERT_NE(NULL, map);
	return map;
}

/* Both views hold the stamps of this round, and each shows what is written to the other. */
static void check_one_memory(struct __test_metadata *_metadata, int buffer)
{
	char *map = map_whole(_metadata, buffer);

	EXPECT_EQ(0, wrong(map, 0, t.pages, t.who));
	EXPECT_EQ(0, wrong(t.mem, 0, t.pages, t.who));
	fill(map, 0, t.pages, t.who + 1);
	EXPECT_EQ(0, wrong(t.mem, 0, t.pages, t.who + 1));
	fill(t.mem, 0, t.pages, t.who + 2);
	EXPECT_EQ(0, wrong(map, 0, t.pages, t.who + 2));
	munmap(map, t.size);
}

static long nonzero(const char *at, size_t size)
{
	const __u64 *word = (const __u64 *)at;
	long bad = 0;

	for (size_t i = 0; i < size / sizeof(*word); i++)
		bad += word[i] != 0;
	return bad;
}

/* Against changes of the file */

static void punch(void)
{
	t.result = fallocate(t.memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, t.at, t.len) ?
		-errno : 0;
}

/* Any range of pages; of hugetlb, every other time, whole huge pages, because others stay. */
static void draw_range(void)
{
	size_t unit = t.round % 2 ? t.kind->page : PAGE, units = t.size / unit;

	t.at = random() % units;
	t.len = 1 + random() % (units - t.at);
	t.at *= unit;
	t.len *= unit;
}

/*
 * Where the hole is, the file has zeros, and the buffer what it met: the old page, which the file
 * has lost, or the new one, which is the file's.
 */
static void check_punched(struct __test_metadata *_metadata, long *met_old, long *met_new)
{
	size_t first = t.at / PAGE, n = t.len / PAGE, end = first + n;
	char *map = map_whole(_metadata, t.buffer);
	long bad = 0, lost = 0, same = 0;

	EXPECT_EQ(0, wrong(t.mem, 0, first, t.who));
	EXPECT_EQ(0, wrong(map, 0, first, t.who));
	EXPECT_EQ(0, wrong(t.mem + end * PAGE, end, t.pages - end, t.who));
	EXPECT_EQ(0, wrong(map + end * PAGE, end, t.pages - end, t.who));
	for (size_t i = first; i < end; i++) {
		__u64 seen = *stamp_of(map + i * PAGE, i);

		bad += *stamp_of(t.mem + i * PAGE, i) != 0;
		bad += seen != 0 && seen != stamp(t.who, i);
	}
	EXPECT_EQ(0, bad);

	fill(map, 0, t.pages, t.who + 1);
	EXPECT_EQ(0, wrong(t.mem, 0, first, t.who + 1));
	EXPECT_EQ(0, wrong(t.mem + end * PAGE, end, t.pages - end, t.who + 1));
	for (size_t i = first; i < end; i++) {
		__u64 seen = *stamp_of(t.mem + i * PAGE, i);

		same += seen == stamp(t.who + 1, i);
		lost += seen == 0;
	}
	EXPECT_EQ((long)n, same + lost);
	*met_old += lost;
	*met_new += same;
	munmap(map, t.size);
}

TEST_F(race, create_and_punch_hole)
{
	long met_old = 0, met_new = 0;

	calibrate(_metadata, t.size);
	for (int i = 0; goes_on(i, 24, met_old && met_new) && PASSED(_metadata); i++) {
		open_round(_metadata, t.size);
		draw_range();
		race(punch);
		EXPECT_ALLOWED(t.result, 0);
		EXPECT_ALLOWED(t.buffer, 0);
		if (t.buffer >= 0)
			check_punched(_metadata, &met_old, &met_new);
		close_round();
	}
	end_rival();
	EXPECT_LT(0, met_old);
	EXPECT_LT(0, met_new);
	TH_LOG("of punched pages, %ld met as they were, %ld as the file has them", met_old,
	       met_new);
}

/*
 * Whoever asks what the file has lost is told what was already punched out, and no more than is in
 * the end. What was used through a mapping goes page by page, so this may be in the midst of it.
 */

static long told_first, told_last;

static long detached_pages(void)
{
	char path[64];

	snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", t.buffer);
	return value_of(path, "udmabuf-detached:");
}

static void ask_what_is_lost(void)
{
	told_first = detached_pages();
	do
		told_last = detached_pages();
	while (!atomic_load(&rival.over));
}

/* Of the file, by whole folios, because of a part nothing is lost. */
static void punch_twice(void)
{
	size_t whole = t.len;

	t.len = whole / 2 / t.kind->page * t.kind->page;
	if (t.len)
		punch();
	t.at += t.len;
	t.len = whole - t.len;
	punch();
}

TEST_F(race, fdinfo_and_punch_hole)
{
	int between = 0;

	open_round(_metadata, t.size);
	create_whole();
	told_first = detached_pages();
	close_round();
	if (told_first < 0)
		SKIP(return, "Needs: fdinfo");
	start_rival(_metadata);
	for (int i = -2; goes_on(i, 24, between) && PASSED(_metadata); i++) {
		size_t folios = t.size / t.kind->page, lost;

		open_round(_metadata, t.size);
		create_whole();
		ASSERT_LE(0, t.buffer);
		t.at = random() % folios;
		t.len = 1 + random() % (folios - t.at);
		t.at *= t.kind->page;
		t.len *= t.kind->page;
		lost = t.len / PAGE;
		race_of(punch_twice, i < 0 ? NULL : ask_what_is_lost);
		EXPECT_ALLOWED(t.result, 0);
		EXPECT_EQ((long)lost, detached_pages());
		if (i >= 0) {
			EXPECT_LE(0, told_first);
			EXPECT_LE(told_first, told_last);
			EXPECT_LE(told_last, (long)lost);
			between += told_first < (long)lost;
		}
		close_round();
	}
	end_rival();
	EXPECT_LT(0, between);
	TH_LOG("%d times asked before all was punched out", between);
}

static void grow(void)
{
	t.result = ftruncate(t.memfd, t.size) ? -errno : 0;
}

/* The second half of the file is not there yet, and then it is, as a hole. */
TEST_F(race, create_and_grow)
{
	int made = 0, refused = 0;

	calibrate(_metadata, t.size / 2);
	for (int i = 0; goes_on(i, 24, made && refused) && PASSED(_metadata); i++) {
		open_round(_metadata, 0);
		close_round();
		t.memfd = new_memfd(t.kind, t.size / 2);
		ASSERT_GE(t.memfd, 0);
		t.mem = map_fd(t.memfd, t.size / 2, PROT_READ | PROT_WRITE);
		ASSERT_NE(NULL, t.mem);
		fill(t.mem, 0, t.pages / 2, t.who);
		race(grow);
		munmap(t.mem, t.size / 2);
		t.mem = map_fd(t.memfd, t.size, PROT_READ | PROT_WRITE);
		ASSERT_NE(NULL, t.mem);
		EXPECT_ALLOWED(t.result, 0);
		EXPECT_ALLOWED(t.buffer, 0, -EINVAL);
		EXPECT_EQ(0, nonzero(t.mem + t.size / 2, t.size / 2));
		fill(t.mem + t.size / 2, t.pages / 2, t.pages / 2, t.who);
		if (t.buffer >= 0)
			check_one_memory(_metadata, t.buffer);
		*(t.buffer >= 0 ? &made : &refused) += 1;
		close_round();
	}
	end_rival();
	EXPECT_LT(0, made);
	EXPECT_LT(0, refused);
	TH_LOG("%d made, %d refused", made, refused);
}

/* Against seals */

static int seals;

static void seal(void)
{
	t.result = fcntl(t.memfd, F_ADD_SEALS, seals) ? -errno : 0;
}

/* A shared mapping would keep the seal off, even one that is for reading. */
static void map_private(struct __test_metadata *_metadata)
{
	t.mem = mmap(NULL, t.size, PROT_READ, MAP_PRIVATE, t.memfd, 0);
	ASSERT_NE(MAP_FAILED, t.mem);
}

/* A file that is sealed against writing has no buffer that could be written to. */
TEST_F(race, create_and_seal_write)
{
	int made = 0, sealed = 0;

	seals = F_SEAL_WRITE;
	calibrate(_metadata, t.size);
	for (int i = 0; goes_on(i, 16, made && sealed) && PASSED(_metadata); i++) {
		open_round(_metadata, t.size);
		munmap(t.mem, t.size);
		race(seal);
		map_private(_metadata);
		EXPECT_ALLOWED(t.buffer, 0, -EINVAL);
		EXPECT_ALLOWED(t.result, 0, -EBUSY);
		/* One of the two, and one only. */
		EXPECT_EQ(t.buffer >= 0, t.result == -EBUSY)
			TH_LOG("round %d: create %d, seal %d", t.round, t.buffer, t.result);
		EXPECT_EQ(F_SEAL_SHRINK | (t.result ? 0 : F_SEAL_WRITE),
			  fcntl(t.memfd, F_GET_SEALS));
		EXPECT_EQ(0, wrong(t.mem, 0, t.pages, t.who));
		made += t.buffer >= 0;
		sealed += !t.result;
		close_round();
	}
	end_rival();
	EXPECT_LT(0, made);
	EXPECT_LT(0, sealed);
	TH_LOG("%d buffers, %d seals", made, sealed);
}

/* Neither is in the way of the other. */
TEST_F(race, create_and_other_seals)
{
	seals = F_SEAL_GROW | F_SEAL_SEAL;
	calibrate(_metadata, t.size);
	for (int i = 0; i < 16 && PASSED(_metadata); i++) {
		open_round(_metadata, t.size);
		race(seal);
		EXPECT_ALLOWED(t.buffer, 0);
		EXPECT_ALLOWED(t.result, 0);
		EXPECT_EQ(F_SEAL_SHRINK | seals, fcntl(t.memfd, F_GET_SEALS));
		if (t.buffer >= 0)
			check_one_memory(_metadata, t.buffer);
		close_round();
	}
	end_rival();
}

static void shrink_and_seal(void)
{
	t.result = ftruncate(t.memfd, t.size - t.kind->page) ? -errno : 0;
	if (!t.result)
		seal();
}

/* A buffer is never longer than its file. */
TEST_F(race, create_and_shrink)
{
	int made = 0;

	seals = F_SEAL_SHRINK;
	calibrate(_metadata, t.size);
	for (int i = 0; i < 16 && PASSED(_metadata); i++) {
		open_round(_metadata, 0);
		close_round();
		t.memfd = memfd_create(MEMFD_NAME, t.kind->memfd_flags | MFD_ALLOW_SEALING);
		ASSERT_GE(t.memfd, 0);
		ASSERT_EQ(0, ftruncate(t.memfd, t.size));
		t.mem = map_fd(t.memfd, t.size, PROT_READ | PROT_WRITE);
		ASSERT_NE(NULL, t.mem);
		fill(t.mem, 0, t.pages, t.who);
		race(shrink_and_seal);
		EXPECT_ALLOWED(t.buffer, -EINVAL);
		EXPECT_ALLOWED(t.result, 0);
		made += t.buffer >= 0;
		close_round();
	}
	end_rival();
	EXPECT_EQ(0, made);
}

/* Against one who puts a huge page in the place of small ones, which stay where they are pinned */

static void collapse(void)
{
	t.result = madvise(t.mem, t.size, 25 /* MADV_COLLAPSE */) ? -errno : 0;
}

TEST_F(race, create_and_collapse)
{
	int collapsed = 0, kept = 0;

	if (t.kind != &shmem)
		SKIP(return, "its pages are huge as it is");
	prefer_movable(false);
	/* It takes longer than a create, so it is what is timed. */
	calibrate_by(_metadata, t.size, collapse);
	for (int i = 0; goes_on(i, 64, collapsed && kept) && PASSED(_metadata); i++) {
		open_round(_metadata, t.size);
		race_of(collapse, create_whole);
		EXPECT_ALLOWED(t.result, 0, -EAGAIN, -EBUSY, -EINVAL);
		ASSERT_LE(0, t.buffer);
		check_one_memory(_metadata, t.buffer);
		*(t.result ? &kept : &collapsed) += 1;
		close_round();
	}
	end_rival();
	EXPECT_LT(0, collapsed);
	EXPECT_LT(0, kept);
	TH_LOG("%d times collapsed, %d times not", collapsed, kept);
}

/* Against a second create, on holes that nobody, or a mapping, has reserved */

static void create_second(void)
{
	t.result = create_at(t.dev, t.memfd, 0, t.size);
}

static void check_pool(struct __test_metadata *_metadata, long used, long rsvd)
{
	struct books now = read_books();

	EXPECT_EQ(used, t.before.free - now.free);
	EXPECT_EQ(rsvd, now.rsvd - t.before.rsvd);
	EXPECT_EQ(t.before.surp, now.surp);
}

static void check_twins(struct __test_metadata *_metadata)
{
	char *map = map_whole(_metadata, t.buffer), *second = map_whole(_metadata, t.result);

	EXPECT_EQ(0, nonzero(map, t.size));
	EXPECT_EQ(0, nonzero(t.mem, t.size));
	fill(map, 0, t.pages, t.who);
	EXPECT_EQ(0, wrong(second, 0, t.pages, t.who));
	EXPECT_EQ(0, wrong(t.mem, 0, t.pages, t.who));
	fill(second, 0, t.pages, t.who + 1);
	EXPECT_EQ(0, wrong(map, 0, t.pages, t.who + 1));
	EXPECT_EQ(0, wrong(t.mem, 0, t.pages, t.who + 1));
	munmap(map, t.size);
	munmap(second, t.size);
}

TEST_F(race, two_creates_on_holes)
{
	long huge = t.kind->pool ? t.size / HUGE : 0;

	calibrate(_metadata, 0);
	for (int i = 0; i < 24 && PASSED(_metadata); i++) {
		bool reserve = i % 2;

		open_round(_metadata, 0);
		/* A reservation lasts as long as the file, so without one there is no mapping. */
		if (!reserve) {
			close_round();
			t.memfd = new_memfd(t.kind, t.size);
			ASSERT_GE(t.memfd, 0);
		}
		check_pool(_metadata, 0, reserve ? huge : 0);
		race(create_second);
		EXPECT_ALLOWED(t.buffer, 0);
		EXPECT_ALLOWED(t.result, 0);
		check_pool(_metadata, huge, 0);
		if (!reserve)
			t.mem = map_fd(t.memfd, t.size, PROT_READ | PROT_WRITE);
		check_pool(_metadata, huge, 0);
		if (t.buffer >= 0 && t.result >= 0)
			check_twins(_metadata);
		close(t.result);
		close_round();
		check_pool(_metadata, 0, 0);
	}
	end_rival();
}

/* When each of the two began and ended */
static struct timespec times[2][2];

static void create_first_timed(void)
{
	clock_gettime(CLOCK_MONOTONIC, &times[0][0]);
	create_whole();
	clock_gettime(CLOCK_MONOTONIC, &times[0][1]);
}

static void create_second_timed(void)
{
	clock_gettime(CLOCK_MONOTONIC, &times[1][0]);
	create_second();
	clock_gettime(CLOCK_MONOTONIC, &times[1][1]);
}

static bool is_earlier(const struct timespec *a, const struct timespec *b)
{
	return a->tv_sec < b->tv_sec || (a->tv_sec == b->tv_sec && a->tv_nsec < b->tv_nsec);
}

static bool were_at_once(void)
{
	return is_earlier(&times[0][0], &times[1][1]) && is_earlier(&times[1][0], &times[0][1]);
}

/* On memory that both have to migrate: the one must not fail because of the other's pins. */
static void two_creates_on_movable_memory(struct __test_metadata *_metadata)
{
	long moved = 0;
	int at_once = 0;

	calibrate(_metadata, t.size);
	for (int i = 0; i < 16 && PASSED(_metadata); i++) {
		open_round(_metadata, t.size);
		moved += movable_pages();
		race_of(create_first_timed, create_second_timed);
		EXPECT_ALLOWED(t.buffer, 0);
		EXPECT_ALLOWED(t.result, 0);
		at_once += were_at_once();
		EXPECT_EQ(0, wrong(t.mem, 0, t.pages, t.who));
		EXPECT_EQ(0, movable_pages());
		if (t.buffer >= 0 && t.result >= 0) {
			check_one_memory(_metadata, t.buffer);
			fill(t.mem, 0, t.pages, t.who);
			check_one_memory(_metadata, t.result);
		}
		close(t.result);
		close_round();
	}
	end_rival();
	EXPECT_LT(0, at_once);
	TH_LOG("16 rounds: %d in which both were at it at once", at_once);
	EXPECT_EQ(16 * (long)t.pages, moved) TH_LOG("the memory was not all movable");
}

TEST_F(race, two_creates_on_movable_memory)
{
	two_creates_on_movable_memory(_metadata);
}

/* Nobody has anything pinned that another is migrating. */
TEST_F(race, two_creates_disturb_no_migration)
{
	long failed;

	ASSERT_TRUE(start_trace(ATTEMPT_EVENT, 0));
	two_creates_on_movable_memory(_metadata);
	EXPECT_LT(0, traced("nr_failed=", &failed));
	EXPECT_EQ(0, failed);
	end_trace();
}

/*
 * On memory that has to be migrated, against one who goes on using the rest of the file: who faults
 * and punches there holds locks of the file that migrating a huge page only tries to get.
 */
static void create_front(void)
{
	t.buffer = create_at(t.dev, t.memfd, 0, t.size / 2);
}

static void use_back(void)
{
	t.at = t.size / 2;
	t.len = t.kind->page;
	do {
		punch();
		t.mem[t.at] = 1;
	} while (!t.result && !atomic_load(&rival.over));
}

TEST_F(race, create_and_use_of_the_rest)
{
	size_t half = t.size / 2;
	long moved = 0;
	char *map;

	calibrate(_metadata, t.size);
	for (int i = 0; i < 16 && PASSED(_metadata); i++) {
		open_round(_metadata, t.size);
		moved += movable_pages();
		race_of(create_front, use_back);
		EXPECT_EQ(0, t.result);
		ASSERT_LE(0, t.buffer);
		map = map_buffer(t.kind, t.buffer, half, PROT_READ | PROT_WRITE);
		ASSERT_NE(NULL, map);
		EXPECT_EQ(0, wrong(map, 0, half / PAGE, t.who));
		munmap(map, half);
		EXPECT_EQ(0, wrong(t.mem, 0, half / PAGE, t.who));
		EXPECT_EQ(0, movable_among(half / PAGE));
		close_round();
	}
	end_rival();
	EXPECT_EQ(16 * (long)t.pages, moved) TH_LOG("the memory was not all movable");
}

/* Against those that move memory: nobody moves what is pinned, and what moves keeps its content */

static long move_all(int node, int *status)
{
	static void *at[MOST_PAGES];
	static int nodes[MOST_PAGES];

	for (size_t i = 0; i < t.pages; i++) {
		at[i] = t.mem + i * PAGE;
		nodes[i] = node;
	}
	return syscall(SYS_move_pages, 0, t.pages, at, nodes, status, MPOL_MF_MOVE);
}

static void move_between_nodes(void)
{
	static int status[MOST_PAGES];
	unsigned long from = 1UL << (t.round / 2 % 2), to = 3 ^ from;
	long ret;

	/* Both return how many pages stayed. */
	if (t.round % 2)
		ret = move_all(t.round / 2 % 2, status);
	else
		ret = syscall(SYS_migrate_pages, 0, 8 * sizeof(long), &from, &to);
	t.result = ret < 0 ? -errno : 0;
}

static void check_not_moved(struct __test_metadata *_metadata)
{
	static __u64 before[MOST_PAGES], after[MOST_PAGES];
	static int status[MOST_PAGES];

	EXPECT_EQ(0, wrong(t.mem, 0, t.pages, t.who));
	EXPECT_TRUE(read_pfns(t.mem, t.pages, before));
	EXPECT_EQ(0, movable_pages());
	for (int node = 0; node < 2; node++)
		EXPECT_LE(0, move_all(node, status));
	EXPECT_EQ(0, wrong(t.mem, 0, t.pages, t.who));
	EXPECT_TRUE(read_pfns(t.mem, t.pages, after));
	EXPECT_EQ(0, memcmp(before, after, t.pages * sizeof(*before)));
}

/* The buffer and the file have the same memory, and who asks for the seal knows. */
static void check_held(struct __test_metadata *_metadata)
{
	/* -1 on a kernel that does not tell. */
	EXPECT_GE(0, detached_pages());
	/* A mapping that can be written to would keep the seal off, too. */
	munmap(t.mem, t.size);
	EXPECT_EQ(-1, fcntl(t.memfd, F_ADD_SEALS, F_SEAL_WRITE));
	t.mem = map_fd(t.memfd, t.size, PROT_READ | PROT_WRITE);
	ASSERT_NE(NULL, t.mem);
}

/*
 * What others move all the time may be refused, for then it cannot be migrated: but now and then, not
 * as a rule. That it never is, the last case looks at: here for all cases together.
 */
static struct {
	int creates, refused;
} *moved_by_others;

static void __attribute__((constructor)) share_with_the_last_case(void)
{
	moved_by_others = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

#define EXPECT_FEW_REFUSED(refused, of) do { \
	moved_by_others->creates += of; \
	moved_by_others->refused += refused; \
	EXPECT_GE((of) / 3, refused); \
	TH_LOG("%d of %d were refused", refused, of); \
} while (0)

static void race_with_mover(struct __test_metadata *_metadata, int rounds, void (*act)(void))
{
	int refused = 0;

	calibrate(_metadata, t.size);
	for (int i = 0; i < rounds && PASSED(_metadata); i++) {
		open_round(_metadata, t.size);
		race(act);
		EXPECT_ALLOWED(t.result, 0);
		EXPECT_ALLOWED(t.buffer, 0, -ENOMEM);
		refused += t.buffer < 0;
		if (t.buffer >= 0) {
			/* Before the memory is touched, which brings back what was taken from the file. */
			check_held(_metadata);
			check_not_moved(_metadata);
			check_one_memory(_metadata, t.buffer);
		}
		close_round();
	}
	end_rival();
	EXPECT_FEW_REFUSED(refused, rounds);
}

TEST_F(race, create_and_move_between_nodes)
{
	race_with_mover(_metadata, 16, move_between_nodes);
}

static void compact(void)
{
	t.result = write_file("/proc/sys/vm/compact_memory", "1") ? 0 : -errno;
}

TEST_F(race, create_and_compaction)
{
	race_with_mover(_metadata, 8, compact);
}

static void page_out(void)
{
	t.result = madvise(t.mem, t.size, MADV_PAGEOUT) ? -errno : 0;
	/* Of hugetlb nothing is paged out, and madvise() has to say so. */
	if (t.kind->pool)
		t.result = t.result == -EINVAL ? 0 : -EPROTO;
}

TEST_F(race, create_and_pageout)
{
	long swapped = value_of("/proc/vmstat", "pswpout ");

	race_with_mover(_metadata, 16, page_out);
	swapped = value_of("/proc/vmstat", "pswpout ") - swapped;
	EXPECT_EQ(!t.kind->pool, swapped > 0);
	TH_LOG("16 rounds: %ld of %zu pages were swapped out", swapped, 16 * t.pages);
}

/*
 * NUMA balancing: threads on both nodes write to all pages, again and again, each to a word of its
 * own. No write may get lost between the old and the new page, whoever migrates it.
 */

#define WRITERS 2
#define BALANCING "/proc/sys/kernel/numa_balancing"
#define BALANCING_DEBUG "/sys/kernel/debug/sched/numa_balancing/"

static struct writer {
	pthread_t thread;
	int cpu;
	atomic_bool end;
	atomic_long rounds;
} writers[WRITERS];

/* Where a writer counts in a page, away from the stamps. */
static __u64 *count_of(size_t page, size_t writer)
{
	return (__u64 *)(t.mem + page * PAGE) + (page + 1 + writer) % (PAGE / sizeof(__u64));
}

static void *writer_thread(void *arg)
{
	struct writer *writer = arg;

	use_cpu(writer->cpu);
	while (!atomic_load(&writer->end)) {
		for (size_t page = 0; page < t.pages; page++)
			++*(volatile __u64 *)count_of(page, writer - writers);
		atomic_fetch_add(&writer->rounds, 1);
	}
	return NULL;
}

/* CPU 0 is on node 0, the last on node 1. */
static void start_writers(struct __test_metadata *_metadata)
{
	long cpus = sysconf(_SC_NPROCESSORS_ONLN);

	for (int i = 0; i < WRITERS; i++) {
		atomic_store(&writers[i].end, false);
		atomic_store(&writers[i].rounds, 0);
		writers[i].cpu = i ? cpus - 1 : 0;
		ASSERT_EQ(0, pthread_create(&writers[i].thread, NULL, writer_thread, writers + i));
	}
}

static void end_writers(struct __test_metadata *_metadata)
{
	long lost = 0;

	for (int i = 0; i < WRITERS; i++) {
		atomic_store(&writers[i].end, true);
		pthread_join(writers[i].thread, NULL);
	}
	for (int i = 0; i < WRITERS; i++)
		for (size_t page = 0; page < t.pages; page++)
			lost += *count_of(page, i) != (__u64)atomic_load(&writers[i].rounds);
	EXPECT_EQ(0, lost);
}

/*
 * Waits, for as long as it can take, until the kernel looks who uses the memory from where. It does
 * not for hugetlb: there, the two just write.
 */
static bool wait_for_balancing(void)
{
	long before = value_of("/proc/vmstat", "numa_hint_faults ");

	if (t.kind->pool)
		return true;
	for (int tries = 0; tries < 2000; tries++) {
		if (value_of("/proc/vmstat", "numa_hint_faults ") > before)
			return true;
		usleep(10000);
	}
	return false;
}

static void balance_fast(void)
{
	write_number(BALANCING_DEBUG "scan_delay_ms", 1);
	write_number(BALANCING_DEBUG "scan_period_min_ms", 1);
	write_number(BALANCING_DEBUG "scan_period_max_ms", 10);
	write_number(BALANCING, 1);
}

static void balance_as_before(void)
{
	write_number(BALANCING, 0);
	write_number(BALANCING_DEBUG "scan_delay_ms", 1000);
	write_number(BALANCING_DEBUG "scan_period_max_ms", 60000);
	write_number(BALANCING_DEBUG "scan_period_min_ms", 1000);
}

TEST_F(race, create_and_numa_balancing)
{
	long faults = value_of("/proc/vmstat", "numa_hint_faults ");
	long moved = value_of("/proc/vmstat", "numa_pages_migrated ");
	int refused = 0;

	ASSERT_LE(0, faults);
	balance_fast();
	for (int i = 0; i < 3 && PASSED(_metadata); i++) {
		open_round(_metadata, t.size);
		prefer_movable(false);
		start_writers(_metadata);
		EXPECT_TRUE(wait_for_balancing()) TH_LOG("nobody balances");
		/*
		 * Whoever writes to a huge page that is unmapped for migration must not keep it
		 * from moving by waiting for it.
		 */
		t.buffer = create_at(t.dev, t.memfd, 0, t.size);
		EXPECT_ALLOWED(t.buffer, 0, -ENOMEM);
		refused += t.buffer < 0;
		EXPECT_TRUE(wait_for_balancing()) TH_LOG("nobody balances");
		end_writers(_metadata);
		prefer_movable(true);
		EXPECT_EQ(0, wrong(t.mem, 0, t.pages, t.who));
		if (t.buffer >= 0) {
			EXPECT_EQ(0, movable_pages());
			check_one_memory(_metadata, t.buffer);
		}
		close_round();
	}
	balance_as_before();
	EXPECT_FEW_REFUSED(refused, 3);
	TH_LOG("%ld hinting faults, %ld pages migrated",
	       value_of("/proc/vmstat", "numa_hint_faults ") - faults,
	       value_of("/proc/vmstat", "numa_pages_migrated ") - moved);
}

/*
 * Offlining takes all the memory of ZONE_MOVABLE on one node, while creates pin what is there.
 * Where a page that is pinned stays there, it never ends: then it is interrupted, after a number
 * of looks that is generous.
 */

static void *offline_thread(void *arg)
{
	offline_blocks();
	atomic_store(&blocks.done, true);
	return arg;
}

static void do_nothing(int sig)
{
	(void)sig;
}

/* Says whether offlining ended by itself. */
static bool wait_for_offlining(pthread_t thread)
{
	bool ended;

	for (int looks = 0; !atomic_load(&blocks.done) && looks < 3000; looks++)
		usleep(10000);
	ended = atomic_load(&blocks.done);
	/* A signal may come between two blocks, and each wait wants one. */
	while (!atomic_load(&blocks.done)) {
		pthread_kill(thread, SIGUSR1);
		usleep(10000);
	}
	pthread_join(thread, NULL);
	return ended;
}

#define OFFLINE_BUFFERS 12

/* In parts, so that the blocks go offline in the middle of it. */
static void create_while_offlining(struct __test_metadata *_metadata, int *buffers, int *refused)
{
	struct sigaction action = { .sa_handler = do_nothing };
	size_t part = t.size / OFFLINE_BUFFERS / t.kind->page * t.kind->page;
	pthread_t thread;

	*refused = 0;
	ASSERT_EQ(0, sigaction(SIGUSR1, &action, NULL));
	atomic_store(&blocks.done, false);
	ASSERT_EQ(0, pthread_create(&thread, NULL, offline_thread, NULL));
	for (int i = 0; i < OFFLINE_BUFFERS; i++) {
		usleep(random() % 20000);
		buffers[i] = create_at(t.dev, t.memfd, i * part, part);
		EXPECT_ALLOWED(buffers[i], 0, -ENOMEM);
		*refused += buffers[i] < 0;
	}
	EXPECT_TRUE(wait_for_offlining(thread))
		TH_LOG("round %d: offlining does not end", t.round);
	/* A block may be refused, with this, when it sees a page that is on its way. */
	EXPECT_ALLOWED(blocks.failed ? blocks.error : 0, 0, -EBUSY);
}

TEST_F(race, create_and_offlining)
{
	int pool = pool_value(POOL_2M, "nr_hugepages"), buffers[OFFLINE_BUFFERS], offline = 0;
	int refused = 0, refused_now;

	find_blocks(movable);
	ASSERT_LT(0, blocks.n);
	t.size = OFFLINE_BUFFERS * (t.kind->page == PAGE ? MIB : HUGE);
	t.pages = t.size / PAGE;
	for (int i = 0; i < 3 && PASSED(_metadata); i++) {
		/* Offlining takes free huge pages from the pool. Half are on each node. */
		write_number(POOL_2M "nr_hugepages", 0);
		write_number(POOL_2M "nr_hugepages", t.kind->pool ? 2 * t.size / HUGE : 0);
		open_round(_metadata, t.size);
		EXPECT_LT(0, movable_pages());
		create_while_offlining(_metadata, buffers, &refused_now);
		offline += blocks.n - blocks.failed;
		EXPECT_EQ(0, wrong(t.mem, 0, t.pages, t.who));
		/* What was refused may be anywhere. */
		if (!refused_now)
			EXPECT_EQ(0, movable_pages());
		refused += refused_now;
		EXPECT_EQ(0, online_blocks());
		for (int b = 0; b < OFFLINE_BUFFERS; b++)
			close(buffers[b]);
		close_round();
	}
	write_number(POOL_2M "nr_hugepages", 0);
	write_number(POOL_2M "nr_hugepages", pool);
	EXPECT_FEW_REFUSED(refused, 3 * OFFLINE_BUFFERS);
	TH_LOG("3 rounds: %d of %d blocks went offline", offline, 3 * blocks.n);
}

/* Races at the end of a buffer */

/* The kernel touches memory for us, so what is not mapped is an error and no signal. */
static bool read_word_at(const void *at, __u64 *word)
{
	static int fd[2];

	if (!fd[1] && pipe2(fd, O_CLOEXEC))
		return false;
	return write(fd[1], at, sizeof(*word)) == sizeof(*word) &&
	       read(fd[0], word, sizeof(*word)) == sizeof(*word);
}

static struct {
	char *map;		/* of the buffer */
	long good, gone, bad;	/* pages read */
} reader;

/* In an order that looks random: most windows are met in the middle. */
static void read_map(void)
{
	size_t page = 0;
	__u64 word;

	for (size_t i = 0; i < t.pages; i++) {
		page = (page * 1664525 + 1013904223) & (t.pages - 1);
		if (!read_word_at(stamp_of(reader.map + page * PAGE, page), &word))
			reader.gone++;
		else if (word == stamp(t.who, page))
			reader.good++;
		else
			reader.bad++;
	}
}

static void unmap_buffer(void)
{
	t.result = munmap(reader.map, t.size) ? -errno : 0;
}

/* All but the mapping of the buffer. */
static void close_everything(void)
{
	t.result = close(t.buffer) || close(t.memfd) || munmap(t.mem, t.size) ? -errno : 0;
}

static void open_reader(struct __test_metadata *_metadata)
{
	open_round(_metadata, t.size);
	create_whole();
	EXPECT_ALLOWED(t.buffer, 0);
	ASSERT_GE(t.buffer, 0);
	reader.map = map_whole(_metadata, t.buffer);
}

/* What is read is the content, or nothing. */
TEST_F(race, fault_and_munmap)
{
	int in_the_middle = 0;
	__u64 word;

	EXPECT_TRUE(read_word_at(&t, &word));
	t.before.fds += 2;
	start_rival(_metadata);
	for (int i = -2; goes_on(i, 16, in_the_middle) && PASSED(_metadata); i++) {
		open_reader(_metadata);
		reader.good = 0;
		reader.gone = 0;
		race_of(read_map, i < 0 ? NULL : unmap_buffer);
		EXPECT_ALLOWED(t.result, 0);
		EXPECT_EQ(0, reader.bad);
		in_the_middle += reader.good && reader.gone;
		if (i < 0)
			unmap_buffer();
		EXPECT_FALSE(read_word_at(reader.map, &word));
		EXPECT_EQ(0, wrong(t.mem, 0, t.pages, t.who));
		close_round();
	}
	end_rival();
	EXPECT_LT(0, in_the_middle);
	TH_LOG("%d times unmapped in the middle", in_the_middle);
}

/* The mapping holds the buffer, and the buffer its memory. */
TEST_F(race, fault_and_close)
{
	__u64 word;

	EXPECT_TRUE(read_word_at(&t, &word));
	t.before.fds += 2;
	start_rival(_metadata);
	for (int i = -2; i < 16 && PASSED(_metadata); i++) {
		open_reader(_metadata);
		race_of(read_map, i < 0 ? NULL : close_everything);
		EXPECT_ALLOWED(t.result, 0);
		if (i < 0)
			close_everything();
		EXPECT_EQ(0, reader.bad);
		EXPECT_EQ(0, reader.gone);
		EXPECT_EQ(0, wrong(reader.map, 0, t.pages, t.who));
		munmap(reader.map, t.size);
	}
	end_rival();
}

static void close_buffer(void)
{
	t.result = close(t.buffer) ? -errno : 0;
}

static int map_error;

static void map_and_read(void)
{
	reader.map = map_buffer(t.kind, t.buffer, t.size, PROT_READ | PROT_WRITE);
	map_error = reader.map ? 0 : -errno;
}

TEST_F(race, mmap_and_close)
{
	int mapped = 0, refused = 0;

	start_rival(_metadata);
	for (int i = -2; (i % 6 || goes_on(i, 60, mapped && refused)) && PASSED(_metadata); i++) {
		/* The memory stays the same for some rounds: only the buffer is at risk. */
		if (i < 0 || i % 6 == 0)
			open_round(_metadata, t.size);
		create_whole();
		EXPECT_ALLOWED(t.buffer, 0);
		race_of(map_and_read, i < 0 ? NULL : close_buffer);
		EXPECT_ALLOWED(t.result, 0);
		EXPECT_ALLOWED(map_error, 0, -EBADF);
		if (i < 0)
			close_buffer();
		t.buffer = -1;
		if (reader.map) {
			EXPECT_EQ(0, wrong(reader.map, 0, t.pages, t.who));
			munmap(reader.map, t.size);
			mapped += i >= 0;
		} else {
			refused++;
		}
		if (i < 0 || i % 6 == 5)
			close_round();
	}
	end_rival();
	EXPECT_LT(0, mapped);
	EXPECT_LT(0, refused);
	TH_LOG("%d mapped, %d refused", mapped, refused);
}

/* A descriptor can be guessed, and closed by somebody who never got it. */
static int guess;

static void close_guess(void)
{
	do
		t.result = close(guess) ? -errno : 0;
	while (t.result == -EBADF && !atomic_load(&rival.over));
}

TEST_F(race, create_and_close_of_what_it_returns)
{
	int closed = 0;

	calibrate(_metadata, t.size);
	for (int i = 0; goes_on(i, 16, closed) && PASSED(_metadata); i++) {
		open_round(_metadata, t.size);
		guess = dup(t.memfd);
		close(guess);
		race(close_guess);
		EXPECT_ALLOWED(t.result, 0, -EBADF);
		EXPECT_ALLOWED(t.buffer, 0);
		EXPECT_EQ(guess, t.buffer);
		if (!t.result) {
			EXPECT_EQ(-1, fcntl(guess, F_GETFD));
			t.buffer = -1;
			closed++;
		}
		EXPECT_EQ(0, wrong(t.mem, 0, t.pages, t.who));
		close_round();
	}
	end_rival();
	/* It need not go wrong: who guesses goes on until the create is over. */
	EXPECT_LT(0, closed);
	TH_LOG("%d closed by a guess", closed);
}

/*
 * CPU access that many begin and end while the buffer is attached to devices and detached. They
 * look at the attachments that others make and end at that moment. What they sync is the memory as
 * the device has it: nobody else writes, so it stays what it was.
 */

#define SYNC_THREADS 4
#define ATTACH_ROUNDS 40

static struct {
	pthread_barrier_t begin;
	atomic_bool end;
	atomic_int attached;		/* the round in which it is; 0: it is not */
	atomic_long rounds, errors;
	atomic_long with_devices;	/* began while a device had the buffer mapped */
} attach_race;

static void *sync_on_thread(void *arg)
{
	static const __u64 ways[] = { DMA_BUF_SYNC_READ, DMA_BUF_SYNC_WRITE, DMA_BUF_SYNC_RW };
	long errors = 0;

	pthread_barrier_wait(&attach_race.begin);
	for (int i = 0; !atomic_load(&attach_race.end); i++) {
		__u64 way = ways[i % ARRAY_SIZE(ways)];
		int attached = atomic_load(&attach_race.attached);

		errors += sync_buffer(t.buffer, DMA_BUF_SYNC_START | way) != 0;
		if (attached && attached == atomic_load(&attach_race.attached))
			atomic_fetch_add(&attach_race.with_devices, 1);
		errors += sync_buffer(t.buffer, DMA_BUF_SYNC_END | way) != 0;
		atomic_fetch_add(&attach_race.rounds, 1);
	}
	atomic_fetch_add(&attach_race.errors, errors);
	return arg;
}

/* Waits until access by the CPU has begun that found the mapping of a device. */
static void wait_for_sync(void)
{
	long before = atomic_load(&attach_race.with_devices);

	while (atomic_load(&attach_race.with_devices) == before)
		usleep(20);
}

TEST_F(race, sync_and_attach)
{
	pthread_t threads[SYNC_THREADS];
	int edu[2];

	for (int d = 0; d < 2; d++) {
		edu[d] = edu_open(d);
		ASSERT_LE(0, edu[d]);
	}
	t.size = t.kind->page == PAGE ? 64 * PAGE : HUGE;
	t.pages = t.size / PAGE;
	open_round(_metadata, t.size);
	t.buffer = create_at(t.dev, t.memfd, 0, 64 * PAGE);
	ASSERT_LE(0, t.buffer);
	/* Stock makes there what all share. */
	EXPECT_EQ(0, sync_buffer(t.buffer, DMA_BUF_SYNC_START | DMA_BUF_SYNC_RW));
	EXPECT_EQ(0, sync_buffer(t.buffer, DMA_BUF_SYNC_END | DMA_BUF_SYNC_RW));
	pthread_barrier_init(&attach_race.begin, NULL, SYNC_THREADS + 1);
	for (int i = 0; i < SYNC_THREADS; i++)
		ASSERT_EQ(0, pthread_create(threads + i, NULL, sync_on_thread, NULL));
	pthread_barrier_wait(&attach_race.begin);
	for (int i = 0; i < ATTACH_ROUNDS || atomic_load(&attach_race.rounds) < ATTACH_ROUNDS; i++) {
		for (int d = 0; d < 2; d++) {
			EXPECT_EQ(0, edu_attach_and_map(edu[d], t.buffer, EDU_BIDIRECTIONAL));
			atomic_store(&attach_race.attached, i + 1);
		}
		/* Mostly, both are gone as soon as they have come. */
		if (i % 8 == 7)
			wait_for_sync();
		for (int d = 0; d < 2; d++) {
			if (d)
				atomic_store(&attach_race.attached, 0);
			EXPECT_EQ(0, edu_detach(edu[(i + d) % 2]));
		}
	}
	atomic_store(&attach_race.end, true);
	for (int i = 0; i < SYNC_THREADS; i++)
		pthread_join(threads[i], NULL);
	EXPECT_EQ(0, atomic_load(&attach_race.errors));
	EXPECT_EQ(0, wrong(t.mem, 0, t.pages, t.who));
	EXPECT_LT(0, atomic_load(&attach_race.with_devices));
	TH_LOG("%ld times began and ended, %ld with a device", atomic_load(&attach_race.rounds),
	       atomic_load(&attach_race.with_devices));
	for (int d = 0; d < 2; d++)
		close(edu[d]);
	close_round();
}

/*
 * A task that is killed while it fills a large hole stops: the file is not filled to its end. It
 * is killed when the first part of the file is there.
 */

#define KILL_SIZE (640 * MIB)
#define KILL_AT (16 * MIB)
#define KILL_LAST (480 * MIB)

static size_t filled(const struct stat *before)
{
	struct stat st;

	if (t.kind->pool)
		return (t.before.free - pool_value(POOL_2M, "free_hugepages")) * HUGE;
	return fstat(t.memfd, &st) ? 0 : (st.st_blocks - before->st_blocks) * 512;
}

/* Returns how much there was when the child was gone. */
static size_t kill_in_the_middle(struct __test_metadata *_metadata, const struct stat *before)
{
	size_t seen = 0;
	int status;
	pid_t pid;

	pid = fork();
	ASSERT_GE(pid, 0);
	if (!pid)
		_exit(create_at(t.dev, t.memfd, 0, KILL_SIZE) < 0);
	while (seen < KILL_AT && !waitpid(pid, &status, WNOHANG)) {
		seen = filled(before);
		sched_yield();
	}
	EXPECT_LE(KILL_AT, seen) TH_LOG("the create ended first, with status %#x", status);
	kill(pid, SIGKILL);
	waitpid(pid, &status, 0);
	return filled(before);
}

TEST_F(race, create_and_kill)
{
	long pool = pool_value(POOL_2M, "nr_hugepages");
	struct stat before;
	size_t left = 0;

	/* Half of them are on the first node, and may be pinned where they are. */
	if (t.kind->pool)
		write_number(POOL_2M "nr_hugepages", pool + 2 * KILL_SIZE / HUGE);
	t.before = read_books();
	for (int i = 0; i < 3 && PASSED(_metadata); i++) {
		t.memfd = new_memfd(t.kind, KILL_SIZE);
		ASSERT_EQ(0, fstat(t.memfd, &before));
		left = kill_in_the_middle(_metadata, &before);
		EXPECT_LT(left, KILL_LAST)
			TH_LOG("killed at %lu MiB, went on to %zu of %lu", KILL_AT / MIB,
			       left / MIB, KILL_SIZE / MIB);
		EXPECT_EQ(t.before.pins, pins());
		close(t.memfd);
	}
	EXPECT_SAME_BOOKS(t.before);
	write_number(POOL_2M "nr_hugepages", 0);
	write_number(POOL_2M "nr_hugepages", pool);
	t.before = read_books();
	TH_LOG("the last one stopped at %zu of %lu MiB", left / MIB, KILL_SIZE / MIB);
}

/*
 * A task that is killed in the middle of a list stops there, however little each item is. It is
 * killed when KILL_AFTER items are there: it shares a CPU with the killer, who goes first, and whom
 * the trace of each item wakes. So nothing depends on how fast this is.
 */

#define KILL_ITEMS 400
#define KILL_AFTER 4
#define KILL_LAST_ITEM 20
#define POOL_NODE0 "/sys/devices/system/node/node0/hugepages/hugepages-2048kB/"

static void go_first(bool first)
{
	struct sched_param param = { .sched_priority = first ? 10 : 0 };

	sched_setscheduler(0, first ? SCHED_FIFO : SCHED_OTHER, &param);
}

/* Each item is a page, or where pages are huge, all of one, in a hole of its own. */
static struct udmabuf_create_list *list_of_holes(void)
{
	struct udmabuf_create_list *list;

	list = calloc(1, sizeof(*list) + KILL_ITEMS * sizeof(*list->list));
	for (size_t i = 0; list && i < KILL_ITEMS; i++) {
		list->list[i].memfd = t.memfd;
		list->list[i].offset = i * HUGE;
		list->list[i].size = t.kind->page;
	}
	if (list)
		list->count = KILL_ITEMS;
	return list;
}

/*
 * Waits until @n holes are filled, or the child has ended. Tells how many are. What fills one is in
 * the trace: a page of shmem is allocated, a page of hugetlb put into its file.
 */
static long wait_for_items(pid_t pid, int n, const struct stat *before, int *status)
{
	int pipe = open(TRACE "trace_pipe", O_RDONLY | O_NONBLOCK | O_CLOEXEC);
	struct pollfd event = { .fd = pipe, .events = POLLIN };
	static char text[64 * KIB];
	long items;

	while ((items = (long)filled(before) / (long)t.kind->page) < n) {
		poll(&event, 1, 100);
		if (read(pipe, text, sizeof(text)) <= 0 && waitpid(pid, status, WNOHANG))
			break;
	}
	close(pipe);
	return items;
}

TEST_F(race, list_and_kill)
{
	long pool = pool_value(POOL_2M, "nr_hugepages"), left, unit = t.kind->page;
	struct udmabuf_create_list *list;
	struct stat before;
	int go[2], status = 0;
	pid_t pid;
	char c;

	prefer_movable(false);
	if (t.kind->pool) {
		write_number(POOL_NODE0 "nr_hugepages", KILL_ITEMS + 8);
		t.before = read_books();
		ASSERT_LE(KILL_ITEMS, pool_value(POOL_NODE0, "free_hugepages"));
	}
	write_number(PARAMETERS "list_limit", KILL_ITEMS);
	t.memfd = new_memfd(t.kind, KILL_ITEMS * HUGE);
	list = list_of_holes();
	ASSERT_NE(NULL, list);
	ASSERT_EQ(0, fstat(t.memfd, &before));
	ASSERT_EQ(0, pipe2(go, O_CLOEXEC));
	use_cpu(0);
	pid = fork();
	ASSERT_LE(0, pid);
	if (!pid)
		_exit(read(go[0], &c, 1) == 1 && ioctl(t.dev, UDMABUF_CREATE_LIST, list) < 0);
	ASSERT_TRUE(start_trace("kmem/mm_page_alloc", pid));
	ASSERT_TRUE(also_trace("filemap/mm_filemap_add_to_page_cache", pid));
	go_first(true);
	ASSERT_EQ(1, write(go[1], "", 1));
	left = wait_for_items(pid, KILL_AFTER, &before, &status);
	kill(pid, SIGKILL);
	go_first(false);
	waitpid(pid, &status, 0);
	EXPECT_TRUE(WIFSIGNALED(status)) TH_LOG("the create ended first, with status %#x", status);
	/* It was in the middle then. */
	EXPECT_LE(KILL_AFTER, left);
	EXPECT_GE(KILL_LAST_ITEM, left);
	left = (long)filled(&before) / unit;
	EXPECT_GE(KILL_LAST_ITEM, left)
		TH_LOG("killed after item %d, went on to %ld of %d", KILL_AFTER, left, KILL_ITEMS);
	EXPECT_EQ(t.before.pins, pins());
	end_trace();
	free(list);
	close(t.memfd);
	close(go[0]);
	close(go[1]);
	write_number(PARAMETERS "list_limit", 1024);
	EXPECT_SAME_BOOKS(t.before);
	write_number(POOL_2M "nr_hugepages", 0);
	write_number(POOL_2M "nr_hugepages", pool);
	t.before = read_books();
	TH_LOG("stopped after %ld of %d items", left, KILL_ITEMS);
}

FIXTURE(movers) {
};

FIXTURE_SETUP(movers)
{
}

FIXTURE_TEARDOWN(movers)
{
}

TEST_F(movers, have_no_create_refused)
{
	EXPECT_LT(0, moved_by_others->creates);
	EXPECT_EQ(0, moved_by_others->refused);
}

TEST_HARNESS_MAIN
