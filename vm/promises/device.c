// SPDX-License-Identifier: GPL-2.0
/*
 * Promise: a device and the CPU see the same bytes. The scatter table that a device gets is the
 * memory of the buffer, all of it and in its order, within the device's limits. What the CPU wrote
 * before the device mapped the buffer, or between the start and the end of a SYNC, the device
 * reads. What the device wrote the CPU reads after it was unmapped, and between the start and the
 * end of a SYNC, which waits for a device that is not done. What one device wrote the others read
 * after it has unmapped. And SYNC does only that: it makes nothing for which no device asked, and
 * it never puts back what somebody else has written in the meantime.
 *
 * How a user would notice: a GPU that reads a buffer shows a frame before the last, or old kernel
 * memory; what a camera recorded is not in the file; what one program drew, another one's SYNC
 * overwrites. On most PCs nothing of this is seen, since there the DMA API has nothing to do: but
 * on those with a device of 32 bits, with encrypted memory, and on most that are not PCs.
 *
 * How this looks: QEMU's device edu copies between memory and itself, and vm/edu imports buffers
 * for it. Each byte is compared. Four machines: the devices' addresses are those of memory; an
 * IOMMU translates; all that is mapped is bounced; the devices do not see the caches of the CPU
 * (which vm/edu imitates). The second device has 32 bits, and half of memory is above that.
 *
 * The guest does not wait for the 100 ms that each copy takes: when it sleeps, its clock jumps. What
 * the bytes are is looked at with a list of all kinds of memory on each machine, and with each kind by
 * itself where the device has copies, on the last two. (The harness of 6.1 cannot choose: it runs all.)
 *
 * VM: MEM=5120 SMP=1 CLOCK=jumps DEVICES="edu,dma_mask=0xffffffffffffffff edu,dma_mask=0xffffffff"
 * VM direct: APPEND= ARGS="-f global -f kept -f limits -v list"
 * VM iommu: APPEND=intel_iommu=on DEVICES="intel-iommu $DEVICES" ARGS="-f global -f kept -f limits -v list"
 * VM swiotlb: APPEND=swiotlb=force
 * VM noncoherent: APPEND=edu.noncoherent=1
 */

#include "promise.h"
#include "drm.h"
#include "edu.h"

#include <drm/vgem_drm.h>

/* By the guest's clock, which jumps. */
#undef TEST_TIMEOUT_DEFAULT
#define TEST_TIMEOUT_DEFAULT 1000000

#define WORDS (PAGE / sizeof(__u64))	/* in a page */

/* A buffer is a list of ranges of up to three memfds. */
struct range {
	unsigned int memfd;
	size_t first, pages;
};

struct layout {
	struct {
		const struct kind *kind;
		size_t pages;
	} memfds[3];
	struct range ranges[8];
};

static const struct layout scattered = {
	.memfds = { { &shmem, 256 } },
	.ranges = { { 0, 0, 256 } },
};

/* More than one huge page. */
static const struct layout on_thp = {
	.memfds = { { &shmem_thp, 1024 } },
	.ranges = { { 0, 0, 520 } },
};

static const struct layout on_hugetlb = {
	.memfds = { { &hugetlb, 1024 } },
	.ranges = { { 0, 0, 520 } },
};

/* The end of a huge page, a whole one, the beginning of the next; and some in the middle. */
static const struct layout parts = {
	.memfds = { { &hugetlb, 1536 }, { &shmem_thp, 1024 } },
	.ranges = { { 0, 509, 518 }, { 1, 1, 300 } },
};

static const struct layout mixed_list = {
	.memfds = { { &shmem, 256 }, { &shmem_thp, 1024 }, { &hugetlb, 1024 } },
	.ranges = {
		{ 2, 700, 3 }, { 0, 17, 37 }, { 1, 500, 130 }, { 2, 0, 64 },
		{ 0, 255, 1 }, { 1, 1, 1 }, { 0, 0, 2 }, { 2, 511, 2 },
	},
};

enum { THE_USER = 1, THE_DEVICE, THE_OWNER, ANOTHER };

static struct {
	struct books before;
	long bounced;
	int memfds[3];
	char *mem[3];
	char *pages[2048];		/* where the CPU finds each page of the buffer */
	size_t nr, size;
	int buffer;
	char *map;
	int edu[2];
	struct edu_transfer written;	/* what a device has written last */
	struct edu_segment segments[4096];	/* where a device has found the buffer last */
	size_t nr_segments;
} t;

/* The devices */

static bool machine_is_direct(void)
{
	return !machine_has("intel_iommu=on") && !machine_has("swiotlb=force") &&
	       !machine_has("edu.noncoherent=1");
}

static int attach_limited(unsigned int edu, struct edu_attach arg)
{
	arg.buffer = t.buffer;
	return ioctl(t.edu[edu], EDU_ATTACH, &arg) ? -errno : 0;
}

static int attach(unsigned int edu)
{
	return attach_limited(edu, (struct edu_attach) { .mask_bits = edu ? 32 : 64 });
}

static int detach(unsigned int edu)
{
	return edu_detach(t.edu[edu]);
}

static int map(unsigned int edu, unsigned int direction)
{
	struct edu_map arg = {
		.direction = direction, .segments = (uintptr_t)t.segments,
		.count = ARRAY_SIZE(t.segments),
	};

	if (ioctl(t.edu[edu], EDU_MAP, &arg))
		return -errno;
	t.nr_segments = arg.count;
	return t.nr_segments > ARRAY_SIZE(t.segments) ? -E2BIG : 0;
}

static int unmap(unsigned int edu)
{
	return ioctl(t.edu[edu], EDU_UNMAP) ? -errno : 0;
}

static int attach_and_map(unsigned int edu, unsigned int direction)
{
	return attach(edu) ?: map(edu, direction);
}

/*
 * What the buffer should have, word by word: who writes notes it here. Each word differs from all
 * others, and with who wrote it.
 */
static __u64 wanted[2048 * WORDS];

static void note(size_t word, size_t words, unsigned int who)
{
	for (size_t i = word; i < word + words; i++)
		wanted[i] = stamp(who, i);
}

static long differ(const void *at, size_t word, size_t words)
{
	long bad = 0;

	if (memcmp(at, wanted + word, words * sizeof(*wanted)))
		for (size_t i = 0; i < words; i++)
			bad += ((const __u64 *)at)[i] != wanted[word + i];
	return bad;
}

/* In the memfds. */
static void cpu_writes(unsigned int who)
{
	note(0, t.nr * WORDS, who);
	for (size_t n = 0; n < t.nr; n++)
		memcpy(t.pages[n], wanted + n * WORDS, PAGE);
}

/* How many words are wrong there. */
static long cpu_sees_wrong(void)
{
	long bad = 0;

	for (size_t n = 0; n < t.nr; n++)
		bad += differ(t.pages[n], n * WORDS, WORDS);
	return bad;
}

/* Through the buffer. */
static void map_writes(unsigned int who)
{
	note(0, t.nr * WORDS, who);
	memcpy(t.map, wanted, t.size);
}

static long map_shows_wrong(void)
{
	return differ(t.map, 0, t.nr * WORDS);
}

/*
 * What the device reads or writes in one go: of each page, some words, others each time; and of a large
 * buffer every second or third page, others each time. All would take several times as long.
 */
#define PIECE 128UL

static struct edu_transfer pieces(void)
{
	static size_t times;
	size_t step = t.nr / 256 ?: 1, first = times % step;

	return (struct edu_transfer) {
		.offset = first * PAGE + times++ * 11 * PIECE % PAGE,
		.count = PIECE, .step = step * PAGE, .pieces = t.nr / step,
	};
}

/* Where it does not matter how much: a few pages, far apart. */
static struct edu_transfer few_pieces(void)
{
	struct edu_transfer what = pieces();

	what.pieces = 16;
	what.step = t.nr / what.pieces * PAGE;
	return what;
}

static int device_does(unsigned int edu, bool write, struct edu_transfer what, void *data)
{
	what.data = (uintptr_t)data;
	return ioctl(t.edu[edu], write ? EDU_WRITE : EDU_READ, &what) ? -errno : 0;
}

/* An errno, or 0. */
static int device_writes_to(unsigned int edu, unsigned int who, struct edu_transfer what)
{
	char *data = malloc(what.pieces * what.count);
	int ret;

	for (size_t i = 0; i < what.pieces; i++) {
		size_t word = (what.offset + i * what.step) / sizeof(*wanted);

		note(word, what.count / sizeof(*wanted), who);
		memcpy(data + i * what.count, wanted + word, what.count);
	}
	ret = device_does(edu, true, what, data);
	free(data);
	t.written = what;
	return ret;
}

static int device_writes(unsigned int edu, unsigned int who)
{
	return device_writes_to(edu, who, pieces());
}

static long differ_for_device(unsigned int edu, struct edu_transfer what)
{
	char *data = malloc(what.pieces * what.count);
	long ret = device_does(edu, false, what, data);

	for (size_t i = 0; ret >= 0 && i < what.pieces; i++)
		ret += differ(data + i * what.count,
			      (what.offset + i * what.step) / sizeof(*wanted),
			      what.count / sizeof(*wanted));
	free(data);
	return ret;
}

/* How many words are wrong for the device, or an errno. */
static long device_sees_wrong(unsigned int edu)
{
	return differ_for_device(edu, pieces());
}

/* The same, of what a device has written last. */
static long device_sees_wrong_there(unsigned int edu)
{
	return differ_for_device(edu, t.written);
}

static long device_sees_wrong_anywhere(unsigned int edu)
{
	return differ_for_device(edu, (struct edu_transfer) {
		.count = PAGE, .step = PAGE, .pieces = t.nr,
	});
}

/* What swiotlb has given out, in slots; -1 where there is none. */
#define BOUNCE_SLOT (2 * KIB)
#define BOUNCE_MAX (256 * KIB)	/* at a time */
#define BOUNCE_TOTAL (64 * MIB)

static long bounced(void)
{
	return value_of("/sys/kernel/debug/swiotlb/io_tlb_used", "");
}

static int start(__u64 flags)
{
	return sync_buffer(t.buffer, DMA_BUF_SYNC_START | flags);
}

static int end(__u64 flags)
{
	return sync_buffer(t.buffer, DMA_BUF_SYNC_END | flags);
}

/* The memory */

/* Small pages in runs of one to five, no run beside the next. */
static void scatter(char *mem, size_t pages)
{
	for (size_t run = 0; run < 37; run++)
		for (size_t n = 0; n < pages; n++)
			if (n * 2 / 5 * 11 % 37 == run)
				mem[n * PAGE] = 0;
}

static void drop_buffer(void)
{
	for (unsigned int edu = 0; edu < 2; edu++)
		detach(edu);
	if (t.map)
		munmap(t.map, t.size);
	if (t.buffer >= 0)
		close(t.buffer);
	t.map = NULL;
	t.buffer = -1;
}

static void drop_memory(const struct layout *layout)
{
	for (unsigned int i = 0; i < 3; i++) {
		if (t.mem[i])
			munmap(t.mem[i], layout->memfds[i].pages * PAGE);
		t.mem[i] = NULL;
		if (t.memfds[i] >= 0)
			close(t.memfds[i]);
		t.memfds[i] = -1;
	}
}

/* Maps the memfds, and knows where the pages of the buffer are. */
static bool map_memory(const struct layout *layout, int prot)
{
	t.nr = 0;
	for (unsigned int i = 0; i < 3 && layout->memfds[i].kind; i++) {
		size_t size = layout->memfds[i].pages * PAGE;

		if (t.mem[i])
			munmap(t.mem[i], size);
		t.mem[i] = map_fd(t.memfds[i], size, prot);
		if (!t.mem[i])
			return false;
	}
	for (const struct range *r = layout->ranges; r < layout->ranges + 8; r++)
		for (size_t n = 0; n < r->pages; n++)
			t.pages[t.nr++] = t.mem[r->memfd] + (r->first + n) * PAGE;
	t.size = t.nr * PAGE;
	return true;
}

static bool new_memory(const struct layout *layout)
{
	const char *thp = "never";

	for (unsigned int i = 0; i < 3 && layout->memfds[i].kind; i++) {
		t.memfds[i] = new_memfd(layout->memfds[i].kind, layout->memfds[i].pages * PAGE);
		if (t.memfds[i] < 0)
			return false;
		if (layout->memfds[i].kind == &shmem_thp)
			thp = shmem_thp.thp;
	}
	/* For a buffer of holes. */
	write_file(THP_SETTING, thp);
	return map_memory(layout, PROT_READ | PROT_WRITE);
}

/* All of it is there, and has what THE_USER wrote. */
static void fill_memory(const struct layout *layout)
{
	for (unsigned int i = 0; i < 3 && layout->memfds[i].kind; i++) {
		size_t pages = layout->memfds[i].pages;

		write_file(THP_SETTING, layout->memfds[i].kind->thp);
		if (layout->memfds[i].kind->page == PAGE)
			scatter(t.mem[i], pages);
		else
			memset(t.mem[i], 0, pages * PAGE);
	}
	cpu_writes(THE_USER);
}

static int new_buffer(const struct layout *layout)
{
	struct udmabuf_create_item items[8];
	__u32 count = 0;

	for (const struct range *r = layout->ranges; r < layout->ranges + 8 && r->pages; r++)
		items[count++] = (struct udmabuf_create_item) {
			.memfd = t.memfds[r->memfd],
			.offset = r->first * PAGE, .size = r->pages * PAGE,
		};
	return create_list(items, count);
}

/* What /proc/kpageflags tells about a page. */
#define KPF_DIRTY (1ULL << 4)
#define KPF_HEAD (1ULL << 15)
#define KPF_TAIL (1ULL << 16)

static __u64 flags_of(__u64 pfn)
{
	int fd = open("/proc/kpageflags", O_RDONLY | O_CLOEXEC);
	__u64 flags = 0;

	if (pread(fd, &flags, sizeof(flags), pfn * sizeof(flags)) != sizeof(flags))
		flags = 0;
	close(fd);
	return flags;
}

/* How many pages of the buffer are in a folio of another size than the layout says. */
static size_t pages_of_wrong_size(const struct layout *layout)
{
	size_t n = 0, bad = 0;

	for (const struct range *r = layout->ranges; r < layout->ranges + 8; r++)
		for (size_t i = 0; i < r->pages; i++) {
			bool large = flags_of(pfn_of(t.pages[n++])) & (KPF_HEAD | KPF_TAIL);

			bad += large != (layout->memfds[r->memfd].kind->page > PAGE);
		}
	return bad;
}

/*
 * How many runs of adjacent pages the buffer has. One begins at each item of the list, and at each
 * multiple of 4 GiB, which no segment crosses.
 */
static size_t runs(const struct layout *layout)
{
	size_t n = 0, count = 0;

	for (const struct range *r = layout->ranges; r < layout->ranges + 8; r++) {
		__u64 next = PFN_NONE;

		for (size_t i = 0; i < r->pages; i++) {
			__u64 pfn = pfn_of(t.pages[n++]);

			count += pfn != next || pfn % (4 * GIB / PAGE) == 0;
			next = pfn + 1;
		}
	}
	return count;
}

/* How many pages of the buffer a device has found where they are in memory. */
static size_t pages_found_in_memory(void)
{
	size_t n = 0, found = 0;

	for (size_t i = 0; i < t.nr_segments; i++)
		for (size_t at = 0; at < t.segments[i].length && n < t.nr; at += PAGE)
			found += t.segments[i].address + at == pfn_of(t.pages[n++]) * PAGE;
	return found;
}

static size_t longest_segment(void)
{
	size_t longest = 0;

	for (size_t i = 0; i < t.nr_segments; i++)
		if (t.segments[i].length > longest)
			longest = t.segments[i].length;
	return longest;
}

static bool has_hugetlb(const struct layout *layout)
{
	for (unsigned int i = 0; i < 3 && layout->memfds[i].kind; i++)
		if (layout->memfds[i].kind->pool)
			return true;
	return false;
}

#define ASSERT_BUFFER() do { \
	t.buffer = new_buffer(variant->layout); \
	ASSERT_LE(0, t.buffer); \
} while (0)

#define ASSERT_MAPPED() do { \
	t.map = map_buffer(has_hugetlb(variant->layout) ? &hugetlb : &shmem, t.buffer, t.size, \
			   PROT_READ | PROT_WRITE); \
	ASSERT_NE(NULL, t.map); \
} while (0)

/* Devices, memory that was not touched, and no buffer yet. */
#define SETUP() do { \
	t.buffer = t.memfds[0] = t.memfds[1] = t.memfds[2] = -1; \
	t.before = read_books(); \
	for (unsigned int edu = 0; edu < 2; edu++) { \
		t.edu[edu] = edu_open(edu); \
		ASSERT_LE(0, t.edu[edu]); \
	} \
	t.bounced = bounced(); \
	ASSERT_TRUE(new_memory(variant->layout)); \
} while (0)

#define TEARDOWN() do { \
	drop_buffer(); \
	drop_memory(variant->layout); \
	close(t.edu[0]); \
	close(t.edu[1]); \
	EXPECT_EQ(t.bounced, bounced()); \
	EXPECT_SAME_BOOKS(t.before); \
	write_file(THP_SETTING, "never"); \
} while (0)

/* Or the cases would show nothing. */
TEST(machine_is_as_it_says)
{
	int edu = edu_open(1);

	ASSERT_LE(0, edu);
	close(edu);
	EXPECT_EQ(machine_has("intel_iommu=on"), !access("/sys/class/iommu/dmar0", F_OK));
	EXPECT_EQ(machine_has("edu.noncoherent=1"),
		  !strcmp("Y", read_word("/sys/module/edu/parameters/noncoherent")));
	if (machine_has("swiotlb=force"))
		EXPECT_LE(0, bounced());
}

/* What the bytes are */

FIXTURE(device) {
};

FIXTURE_VARIANT(device) {
	const struct layout *layout;
};

FIXTURE_VARIANT_ADD(device, scattered) { .layout = &scattered };

FIXTURE_VARIANT_ADD(device, thp) { .layout = &on_thp };

FIXTURE_VARIANT_ADD(device, hugetlb) { .layout = &on_hugetlb };

FIXTURE_VARIANT_ADD(device, parts) { .layout = &parts };

FIXTURE_VARIANT_ADD(device, list) { .layout = &mixed_list };

FIXTURE_SETUP(device)
{
	SETUP();
}

FIXTURE_TEARDOWN(device)
{
	TEARDOWN();
}

/* Or the cases would show nothing: what memory the buffer has, and where the device finds it. */
TEST_F(device, memory_is_as_it_says)
{
	fill_memory(variant->layout);
	ASSERT_BUFFER();
	EXPECT_EQ(0, pages_of_wrong_size(variant->layout));
	if (variant->layout == &scattered)
		EXPECT_LE(t.nr / 5, runs(variant->layout));

	ASSERT_EQ(0, attach_and_map(0, EDU_BIDIRECTIONAL));
	EXPECT_EQ(machine_is_direct() ? t.nr : 0, pages_found_in_memory());
	if (machine_has("swiotlb=force"))
		EXPECT_LE(t.size, (bounced() - t.bounced) * BOUNCE_SLOT);
}

TEST_F(device, reads_what_was_written_before)
{
	fill_memory(variant->layout);
	ASSERT_BUFFER();
	ASSERT_EQ(0, attach_and_map(0, EDU_TO_DEVICE));
	EXPECT_EQ(0, device_sees_wrong_anywhere(0));
}

/* Leaves memory that is given out next full of something. */
static void soil_memory(void)
{
	size_t size = 16 * HUGE;
	char *mem = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	int memfd = new_memfd(&hugetlb, size);
	char *huge = map_fd(memfd, size, PROT_READ | PROT_WRITE);

	if (mem != MAP_FAILED) {
		memset(mem, 0x5a, size);
		munmap(mem, size);
	}
	if (huge) {
		memset(huge, 0x5a, size);
		munmap(huge, size);
	}
	close(memfd);
}

TEST_F(device, reads_zeros_in_holes)
{
	soil_memory();
	drop_memory(variant->layout);
	ASSERT_TRUE(new_memory(variant->layout));
	ASSERT_BUFFER();
	ASSERT_EQ(0, attach_and_map(0, EDU_BIDIRECTIONAL));
	EXPECT_EQ(0, device_sees_wrong_anywhere(0));
	ASSERT_EQ(0, unmap(0));
	EXPECT_EQ(0, cpu_sees_wrong());
}

TEST_F(device, written_is_there_after_unmap)
{
	fill_memory(variant->layout);
	ASSERT_BUFFER();
	ASSERT_EQ(0, attach_and_map(0, EDU_FROM_DEVICE));
	ASSERT_EQ(0, device_writes(0, THE_DEVICE));
	ASSERT_EQ(0, unmap(0));
	EXPECT_EQ(0, cpu_sees_wrong());
	ASSERT_EQ(0, detach(0));
	EXPECT_EQ(0, cpu_sees_wrong());
	ASSERT_MAPPED();
	EXPECT_EQ(0, map_shows_wrong());
}

TEST_F(device, written_is_there_after_start)
{
	fill_memory(variant->layout);
	ASSERT_BUFFER();
	ASSERT_EQ(0, attach_and_map(0, EDU_BIDIRECTIONAL));
	ASSERT_EQ(0, device_writes(0, THE_DEVICE));
	ASSERT_EQ(0, start(DMA_BUF_SYNC_READ));
	EXPECT_EQ(0, cpu_sees_wrong());
	ASSERT_EQ(0, end(DMA_BUF_SYNC_READ));
	ASSERT_MAPPED();
	EXPECT_EQ(0, map_shows_wrong());
}

TEST_F(device, reads_what_was_written_until_end)
{
	fill_memory(variant->layout);
	ASSERT_BUFFER();
	ASSERT_MAPPED();
	ASSERT_EQ(0, attach_and_map(0, EDU_BIDIRECTIONAL));
	ASSERT_EQ(0, start(DMA_BUF_SYNC_WRITE));
	map_writes(ANOTHER);
	ASSERT_EQ(0, end(DMA_BUF_SYNC_WRITE));
	EXPECT_EQ(0, device_sees_wrong(0));

	ASSERT_EQ(0, start(DMA_BUF_SYNC_RW));
	cpu_writes(THE_OWNER);
	ASSERT_EQ(0, end(DMA_BUF_SYNC_RW));
	EXPECT_EQ(0, device_sees_wrong(0));
}

/* An attachment can be mapped many times, in any direction; in between there is nothing to sync. */
TEST_F(device, each_mapping_begins_anew)
{
	fill_memory(variant->layout);
	ASSERT_BUFFER();
	ASSERT_EQ(0, attach_and_map(0, EDU_TO_DEVICE));
	ASSERT_EQ(0, unmap(0));
	cpu_writes(ANOTHER);
	ASSERT_EQ(0, map(0, EDU_TO_DEVICE));
	EXPECT_EQ(0, device_sees_wrong(0));
	ASSERT_EQ(0, unmap(0));
	ASSERT_EQ(0, map(0, EDU_FROM_DEVICE));
	ASSERT_EQ(0, device_writes(0, THE_DEVICE));
	ASSERT_EQ(0, unmap(0));
	EXPECT_EQ(0, cpu_sees_wrong());
}

/* Who is going to write does not want what the device has. */
TEST_F(device, start_to_write_keeps_what_was_written)
{
	fill_memory(variant->layout);
	ASSERT_BUFFER();
	ASSERT_EQ(0, attach_and_map(0, EDU_BIDIRECTIONAL));
	cpu_writes(THE_OWNER);
	ASSERT_EQ(0, start(DMA_BUF_SYNC_WRITE));
	EXPECT_EQ(0, cpu_sees_wrong());
	ASSERT_EQ(0, end(DMA_BUF_SYNC_WRITE));
	EXPECT_EQ(0, device_sees_wrong(0));
}

/* Who has only read has nothing for the device, which has written in the meantime. */
TEST_F(device, end_of_reading_keeps_what_the_device_wrote)
{
	fill_memory(variant->layout);
	ASSERT_BUFFER();
	ASSERT_EQ(0, attach_and_map(0, EDU_BIDIRECTIONAL));
	ASSERT_EQ(0, start(DMA_BUF_SYNC_READ));
	ASSERT_EQ(0, device_writes(0, THE_DEVICE));
	ASSERT_EQ(0, end(DMA_BUF_SYNC_READ));
	ASSERT_EQ(0, start(DMA_BUF_SYNC_READ));
	EXPECT_EQ(0, cpu_sees_wrong());
	ASSERT_EQ(0, end(DMA_BUF_SYNC_READ));
}

/* From a device that cannot write there is nothing to fetch, */
TEST_F(device, reader_overwrites_nothing)
{
	fill_memory(variant->layout);
	ASSERT_BUFFER();
	ASSERT_EQ(0, attach_and_map(0, EDU_TO_DEVICE));
	cpu_writes(THE_OWNER);
	ASSERT_EQ(0, start(DMA_BUF_SYNC_READ));
	EXPECT_EQ(0, cpu_sees_wrong());
	ASSERT_EQ(0, end(DMA_BUF_SYNC_READ));
	ASSERT_EQ(0, start(DMA_BUF_SYNC_RW));
	EXPECT_EQ(0, cpu_sees_wrong());
	ASSERT_EQ(0, end(DMA_BUF_SYNC_RW));
	EXPECT_EQ(0, device_sees_wrong(0));
	ASSERT_EQ(0, unmap(0));
	EXPECT_EQ(0, cpu_sees_wrong());
}

/* and to one that does not read, nothing to bring. */
TEST_F(device, writer_is_not_overwritten)
{
	fill_memory(variant->layout);
	ASSERT_BUFFER();
	ASSERT_EQ(0, attach_and_map(0, EDU_FROM_DEVICE));
	ASSERT_EQ(0, device_writes(0, THE_DEVICE));
	ASSERT_EQ(0, start(DMA_BUF_SYNC_WRITE));
	ASSERT_EQ(0, end(DMA_BUF_SYNC_WRITE));
	ASSERT_EQ(0, start(DMA_BUF_SYNC_READ));
	EXPECT_EQ(0, cpu_sees_wrong());
	ASSERT_EQ(0, end(DMA_BUF_SYNC_READ));
}

/* What the CPU writes stays, although the device writes all that it has once it unmaps. */
TEST_F(device, writer_keeps_what_was_written_until_end)
{
	size_t half = t.nr / 2 * WORDS;

	fill_memory(variant->layout);
	ASSERT_BUFFER();
	ASSERT_MAPPED();
	ASSERT_EQ(0, attach_and_map(0, EDU_FROM_DEVICE));
	ASSERT_EQ(0, device_writes_to(0, THE_DEVICE, few_pieces()));
	ASSERT_EQ(0, start(DMA_BUF_SYNC_WRITE));
	note(0, half, ANOTHER);
	memcpy(t.map, wanted, half * sizeof(*wanted));
	ASSERT_EQ(0, end(DMA_BUF_SYNC_WRITE));
	ASSERT_EQ(0, device_writes_to(0, THE_DEVICE, few_pieces()));
	ASSERT_EQ(0, unmap(0));
	EXPECT_EQ(0, cpu_sees_wrong());
	EXPECT_EQ(0, map_shows_wrong());
}

/* One writes, the other reads; each has been the first to attach. */
TEST_F(device, two_devices)
{
	fill_memory(variant->layout);
	ASSERT_BUFFER();
	ASSERT_MAPPED();
	for (unsigned int order = 0; order < 4; order++) {
		unsigned int writer = order & 1, reader = !writer, who = ANOTHER + 2 * order;

		if (order & 2) {
			ASSERT_EQ(0, attach_and_map(writer, EDU_FROM_DEVICE));
			ASSERT_EQ(0, attach_and_map(reader, EDU_TO_DEVICE));
		} else {
			ASSERT_EQ(0, attach_and_map(reader, EDU_TO_DEVICE));
			ASSERT_EQ(0, attach_and_map(writer, EDU_FROM_DEVICE));
		}
		ASSERT_EQ(0, device_writes_to(writer, who, few_pieces()));
		ASSERT_EQ(0, start(DMA_BUF_SYNC_RW));
		EXPECT_EQ(0, map_shows_wrong());
		ASSERT_EQ(0, end(DMA_BUF_SYNC_RW));
		EXPECT_EQ(0, device_sees_wrong_there(reader));
		ASSERT_EQ(0, detach(order & 2 ? writer : reader));
		ASSERT_EQ(0, detach(order & 2 ? reader : writer));
	}
}

/* The reader needs no SYNC by the CPU to find what the writer left. */
TEST_F(device, reader_sees_what_was_unmapped)
{
	fill_memory(variant->layout);
	ASSERT_BUFFER();
	ASSERT_EQ(0, attach_and_map(0, EDU_TO_DEVICE));
	ASSERT_EQ(0, attach_and_map(1, EDU_FROM_DEVICE));
	ASSERT_EQ(0, device_writes_to(1, THE_DEVICE, few_pieces()));
	ASSERT_EQ(0, unmap(1));
	EXPECT_EQ(0, device_sees_wrong_there(0));
	EXPECT_EQ(0, cpu_sees_wrong());
}

/* Device 0 could write, and has not: its copy is old. Each order of mapping and unmapping. */
TEST_F(device, writer_prevails)
{
	fill_memory(variant->layout);
	ASSERT_BUFFER();
	for (unsigned int order = 0; order < 4; order++) {
		unsigned int first = order & 1, unmapped = order >> 1;

		for (unsigned int n = 0; n < 2; n++) {
			unsigned int edu = first ^ n;

			ASSERT_EQ(0, attach_and_map(edu, edu ? EDU_FROM_DEVICE :
							       EDU_BIDIRECTIONAL));
		}
		ASSERT_EQ(0, device_writes_to(1, ANOTHER + order, few_pieces()));
		ASSERT_EQ(0, start(DMA_BUF_SYNC_READ));
		EXPECT_EQ(0, cpu_sees_wrong())
			TH_LOG("after the start, order %u", order);
		ASSERT_EQ(0, end(DMA_BUF_SYNC_READ));
		ASSERT_EQ(0, detach(unmapped));
		ASSERT_EQ(0, detach(!unmapped));
		EXPECT_EQ(0, cpu_sees_wrong())
			TH_LOG("after unmapping, order %u", order);
	}
}

TEST_F(device, two_readers)
{
	fill_memory(variant->layout);
	ASSERT_BUFFER();
	ASSERT_EQ(0, attach_and_map(0, EDU_BIDIRECTIONAL));
	ASSERT_EQ(0, attach_and_map(1, EDU_TO_DEVICE));
	ASSERT_EQ(0, start(DMA_BUF_SYNC_RW));
	cpu_writes(ANOTHER);
	ASSERT_EQ(0, end(DMA_BUF_SYNC_RW));
	EXPECT_EQ(0, device_sees_wrong(0));
	EXPECT_EQ(0, device_sees_wrong(1));

	/* One that has gone does not take the other along. */
	ASSERT_EQ(0, detach(0));
	ASSERT_EQ(0, start(DMA_BUF_SYNC_WRITE));
	cpu_writes(THE_OWNER);
	ASSERT_EQ(0, end(DMA_BUF_SYNC_WRITE));
	EXPECT_EQ(0, device_sees_wrong(1));
}

/* A device that is not done */

static struct {
	int ret;
	atomic_bool returned;
} starter;

static void *start_to_read(void *arg)
{
	(void)arg;
	starter.ret = start(DMA_BUF_SYNC_READ);
	starter.returned = true;
	return NULL;
}

/*
 * vgem lends its fence, which expires after 10 s. By then it has imported the buffer itself, and on
 * a machine that bounces has a copy of it, an old one.
 */
TEST_F(device, start_waits_for_a_writer)
{
	struct drm_vgem_fence_attach fence = { .flags = VGEM_FENCE_WRITE };
	struct drm_vgem_fence_signal signal = { };
	struct edu_transfer what = few_pieces();
	int vgem = drm_open("vgem", NULL);
	pthread_t thread;
	long handle;

	if (vgem < 0)
		SKIP(return, "no vgem");
	fill_memory(variant->layout);
	ASSERT_BUFFER();
	handle = drm_import(vgem, t.buffer);
	ASSERT_LT(0, handle);
	fence.handle = handle;
	ASSERT_EQ(0, attach_and_map(0, EDU_FROM_DEVICE));
	ASSERT_EQ(0, ioctl(vgem, DRM_IOCTL_VGEM_FENCE_ATTACH, &fence));

	starter.returned = false;
	ASSERT_EQ(0, pthread_create(&thread, NULL, start_to_read, NULL));
	/* There is one CPU: the thread starts as soon as this one sleeps. */
	usleep(100000);
	what.pieces = 2;
	EXPECT_EQ(0, device_writes_to(0, THE_DEVICE, what));
	EXPECT_FALSE(starter.returned);
	signal.fence = fence.out_fence;
	EXPECT_EQ(0, ioctl(vgem, DRM_IOCTL_VGEM_FENCE_SIGNAL, &signal))
		TH_LOG("the fence: %s", strerror(errno));
	pthread_join(thread, NULL);
	EXPECT_EQ(0, starter.ret);
	EXPECT_EQ(0, cpu_sees_wrong());
	EXPECT_EQ(0, end(DMA_BUF_SYNC_READ));

	EXPECT_EQ(0, drm_close_handle(vgem, handle));
	close(vgem);
}

/* Without a device */

TEST_F(device, two_writers_without_a_device)
{
	fill_memory(variant->layout);
	ASSERT_BUFFER();
	ASSERT_MAPPED();
	ASSERT_EQ(0, start(DMA_BUF_SYNC_RW));
	map_writes(ANOTHER);
	ASSERT_EQ(0, end(DMA_BUF_SYNC_RW));
	cpu_writes(THE_OWNER);
	ASSERT_EQ(0, start(DMA_BUF_SYNC_READ));
	EXPECT_EQ(0, cpu_sees_wrong());
	EXPECT_EQ(0, map_shows_wrong());
	EXPECT_EQ(0, end(DMA_BUF_SYNC_READ));
	EXPECT_EQ(0, cpu_sees_wrong());
}

/* Also when one was there, and has unmapped. */
TEST_F(device, two_writers_after_a_device)
{
	fill_memory(variant->layout);
	ASSERT_BUFFER();
	ASSERT_EQ(0, attach_and_map(0, EDU_BIDIRECTIONAL));
	ASSERT_EQ(0, device_writes(0, THE_DEVICE));
	ASSERT_EQ(0, unmap(0));
	cpu_writes(THE_OWNER);
	ASSERT_EQ(0, start(DMA_BUF_SYNC_RW));
	EXPECT_EQ(0, cpu_sees_wrong());
	ASSERT_EQ(0, end(DMA_BUF_SYNC_RW));
	EXPECT_EQ(0, cpu_sees_wrong());
}

TEST_F(device, sync_makes_nothing)
{
	long held = bounced();

	ASSERT_BUFFER();
	ASSERT_EQ(0, start(DMA_BUF_SYNC_RW));
	EXPECT_EQ(held, bounced());
	ASSERT_EQ(0, end(DMA_BUF_SYNC_RW));
	ASSERT_EQ(0, attach(0));
	ASSERT_EQ(0, start(DMA_BUF_SYNC_RW));
	EXPECT_EQ(held, bounced());
	ASSERT_EQ(0, end(DMA_BUF_SYNC_RW));
	ASSERT_EQ(0, map(0, EDU_BIDIRECTIONAL));
	ASSERT_EQ(0, unmap(0));
	EXPECT_EQ(held, bounced());
}

/* More than swiotlb has, if each took some. */
TEST_F(device, many_are_synced)
{
	int buffers[128], n;

	ASSERT_BUFFER();
	for (n = 0; n < (int)ARRAY_SIZE(buffers); n++) {
		buffers[n] = new_buffer(variant->layout);
		ASSERT_LE(0, buffers[n]);
		ASSERT_EQ(0, sync_buffer(buffers[n], DMA_BUF_SYNC_START | DMA_BUF_SYNC_RW));
	}
	fill_memory(variant->layout);
	ASSERT_EQ(0, attach_and_map(0, EDU_BIDIRECTIONAL));
	EXPECT_EQ(0, device_sees_wrong(0));
	while (n--)
		close(buffers[n]);
}

/* What is kept: not of hugetlb, whose pages are never clean, and never paged out */

FIXTURE(kept) {
};

FIXTURE_VARIANT(kept) {
	const struct layout *layout;
};

FIXTURE_VARIANT_ADD(kept, scattered) { .layout = &scattered };

FIXTURE_VARIANT_ADD(kept, thp) { .layout = &on_thp };

FIXTURE_VARIANT_ADD(kept, parts) { .layout = &parts };

FIXTURE_VARIANT_ADD(kept, list) { .layout = &mixed_list };

FIXTURE_SETUP(kept)
{
	SETUP();
}

FIXTURE_TEARDOWN(kept)
{
	TEARDOWN();
}

/* How many folios of shmem the buffer has; in @dirty how many of them are dirty. */
static int shmem_folios(const struct layout *layout, int *dirty)
{
	int folios = 0;

	*dirty = 0;
	for (const struct range *r = layout->ranges; r < layout->ranges + 8; r++) {
		if (layout->memfds[r->memfd].kind->pool)
			continue;
		for (size_t n = 0; n < r->pages; n++) {
			const char *at = t.mem[r->memfd] + (r->first + n) * PAGE;
			__u64 pfn, flags;

			(void)*(volatile const char *)at;
			pfn = pfn_of(at);
			flags = flags_of(pfn);
			/* Of the folio that the page before was in. */
			if (n && flags & KPF_TAIL)
				continue;
			/* The head is dirty or not, also where the range begins after it. */
			while (flags & KPF_TAIL)
				flags = flags_of(--pfn);
			folios++;
			*dirty += !!(flags & KPF_DIRTY);
		}
	}
	return folios;
}

/* The buffer of what nobody has touched is used by a device, and goes. */
#define USED_BY_DEVICE(direction, use) do { \
	ASSERT_BUFFER(); \
	ASSERT_EQ(0, attach_and_map(0, direction)); \
	ASSERT_EQ(0, use); \
	ASSERT_EQ(0, unmap(0)); \
	ASSERT_EQ(0, detach(0)); \
	drop_buffer(); \
	/* Readable only: a PTE that is writable is dirty for reclaim. */ \
	ASSERT_TRUE(map_memory(variant->layout, PROT_READ)); \
} while (0)

TEST_F(kept, read_is_clean)
{
	int dirty;

	USED_BY_DEVICE(EDU_TO_DEVICE, device_sees_wrong(0));
	EXPECT_LT(0, shmem_folios(variant->layout, &dirty));
	EXPECT_EQ(0, dirty);
}

TEST_F(kept, written_is_dirty)
{
	int dirty, folios;

	USED_BY_DEVICE(EDU_FROM_DEVICE, 0);
	folios = shmem_folios(variant->layout, &dirty);
	EXPECT_LT(0, folios);
	EXPECT_EQ(folios, dirty);
}

TEST_F(kept, written_is_kept)
{
	long before = value_of("/proc/vmstat", "pswpout ");

	USED_BY_DEVICE(EDU_FROM_DEVICE, device_writes(0, THE_DEVICE));
	for (int pass = 0; pass < 2; pass++) {
		EXPECT_EQ(0, cpu_sees_wrong());
		for (unsigned int i = 0; i < 3 && t.mem[i]; i++)
			madvise(t.mem[i], variant->layout->memfds[i].pages * PAGE, MADV_PAGEOUT);
	}
	EXPECT_EQ(0, cpu_sees_wrong());
	EXPECT_LT(before, value_of("/proc/vmstat", "pswpout "))
		TH_LOG("nothing was paged out");
}

/* What a device cannot do */

FIXTURE(limits) {
};

FIXTURE_VARIANT(limits) {
	const struct layout *layout;
};

FIXTURE_VARIANT_ADD(limits, scattered) { .layout = &scattered };

FIXTURE_VARIANT_ADD(limits, thp) { .layout = &on_thp };

FIXTURE_VARIANT_ADD(limits, hugetlb) { .layout = &on_hugetlb };

FIXTURE_VARIANT_ADD(limits, parts) { .layout = &parts };

FIXTURE_VARIANT_ADD(limits, list) { .layout = &mixed_list };

FIXTURE_SETUP(limits)
{
	SETUP();
}

FIXTURE_TEARDOWN(limits)
{
	TEARDOWN();
}

/* Maps for a device with limits; how many segments break them, or an errno. */
static long map_limited(unsigned int edu, struct edu_attach limits)
{
	__u64 max = limits.max_segment ?: 64 * KIB, boundary = limits.boundary ?: UINT_MAX, sum = 0;
	__u64 mask = limits.mask_bits && limits.mask_bits < 64 ?
		     (1ULL << limits.mask_bits) - 1 : ~0ULL;
	long bad = 0;
	int ret = attach_limited(edu, limits) ?: map(edu, EDU_BIDIRECTIONAL);

	if (ret)
		return ret;
	for (size_t i = 0; i < t.nr_segments; i++) {
		__u64 length = t.segments[i].length;
		__u64 first = t.segments[i].address, last = first + length - 1;

		bad += length > max || last > mask || (first & ~boundary) != (last & ~boundary);
		sum += length;
	}
	printf("# %zu segments, the longest of %zu bytes\n", t.nr_segments, longest_segment());
	return sum == t.size ? bad : -EMSGSIZE;
}

/* Within the limits, and the right bytes in both directions. */
#define LIMITED(edu, ...) do { \
	fill_memory(variant->layout); \
	ASSERT_BUFFER(); \
	ASSERT_EQ(0, map_limited(edu, (struct edu_attach) { __VA_ARGS__ })); \
	EXPECT_EQ(0, device_sees_wrong(edu)); \
	ASSERT_EQ(0, device_writes_to(edu, THE_DEVICE, few_pieces())); \
	ASSERT_EQ(0, unmap(edu)); \
	EXPECT_EQ(0, cpu_sees_wrong()); \
} while (0)

TEST_F(limits, segments_of_64_kib)
{
	LIMITED(0, .max_segment = 64 * KIB);
}

TEST_F(limits, segments_of_a_page)
{
	LIMITED(0, .max_segment = PAGE);
}

TEST_F(limits, segments_of_no_whole_pages)
{
	LIMITED(0, .max_segment = 3 * PAGE + 512);
}

/* As long as the memory allows, and the machine. */
TEST_F(limits, segments_without_limit)
{
	LIMITED(0, .max_segment = UINT_MAX & ~(PAGE - 1));
	if (machine_is_direct())
		EXPECT_EQ(runs(variant->layout), t.nr_segments);
	if (machine_has("swiotlb=force"))
		EXPECT_GE(BOUNCE_MAX, longest_segment());
}

/* It is refused, and nothing is left of it. */
TEST_F(limits, more_than_can_be_bounced)
{
	size_t size = BOUNCE_TOTAL + 16 * MIB;
	struct books before = read_books();
	int memfd;

	if (!machine_has("swiotlb=force"))
		SKIP(return, "here, nothing is bounced");
	memfd = new_memfd(&shmem_thp, size);
	ASSERT_LE(0, memfd);
	t.buffer = create(memfd, 0, size);
	ASSERT_LE(0, t.buffer);
	EXPECT_EQ(-EIO, attach_and_map(0, EDU_BIDIRECTIONAL));
	EXPECT_EQ(t.bounced, bounced());
	drop_buffer();
	close(memfd);
	EXPECT_SAME_BOOKS(before);

	LIMITED(0, .mask_bits = 64);
}

/* A page cannot be cut; to refuse is all right. */
TEST_F(limits, segments_of_less_than_a_page)
{
	long ret;

	fill_memory(variant->layout);
	ASSERT_BUFFER();
	ret = map_limited(0, (struct edu_attach) { .max_segment = 2048 });
	EXPECT_TRUE(!ret || ret == -EINVAL)
		TH_LOG("%ld", ret);
	if (!ret)
		EXPECT_EQ(0, device_sees_wrong(0));
}

TEST_F(limits, boundary)
{
	LIMITED(0, .max_segment = 32 * KIB, .boundary = 64 * KIB - 1);
}

TEST_F(limits, boundary_within_a_segment)
{
	LIMITED(0, .max_segment = 192 * KIB, .boundary = 16 * KIB - 1);
}

/* Memory that this device does not reach, or only by an IOMMU. */
TEST_F(limits, mask_of_32_bits)
{
	bool above = false;

	fill_memory(variant->layout);
	for (size_t n = 0; n < t.nr; n++)
		above |= pfn_of(t.pages[n]) >= 4 * GIB / PAGE;
	ASSERT_TRUE(above);
	LIMITED(1, .mask_bits = 32);
	ASSERT_EQ(0, map(1, EDU_BIDIRECTIONAL));
	ASSERT_EQ(0, device_writes(1, ANOTHER));
	ASSERT_EQ(0, start(DMA_BUF_SYNC_RW));
	EXPECT_EQ(0, cpu_sees_wrong());
	cpu_writes(THE_OWNER);
	ASSERT_EQ(0, end(DMA_BUF_SYNC_RW));
	EXPECT_EQ(0, device_sees_wrong(1));
}

TEST_F(limits, mask_of_28_bits)
{
	if (!machine_has("intel_iommu=on"))
		SKIP(return, "without an IOMMU, no memory is low enough");
	LIMITED(0, .mask_bits = 28);
}

TEST_F(limits, untrusted)
{
	LIMITED(0, .untrusted = 1);
}

TEST_HARNESS_MAIN
