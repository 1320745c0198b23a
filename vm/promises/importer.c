// SPDX-License-Identifier: GPL-2.0
/*
 * Promise: a device driver can import a buffer, use it in any way that dma-buf has, and let go of
 * it in any order: it always works on the memory that the memfd has, and that memory stays until
 * the last user is gone, keeps what was written to it, and is given back then.
 *
 * How a user would notice: QEMU and crosvm hand guest memory to the GPU driver by way of udmabuf.
 * An importer that is left with freed memory, or with a copy, shows a wrong picture or corrupts
 * the guest; one that writes to memory which is not marked dirty loses the frame when the guest's
 * memory is swapped; one that leaks keeps the guest's memory after the guest has gone.
 *
 * How this looks: with two real importers, vgem and vkms (drm.h), on each kind of memory. What
 * the memfd has, what the importer's mapping has, and the CRC of the pixels that vkms read through
 * its kernel mapping, are the same, each after the other wrote. All orders of giving up the
 * memfd, the buffer, the handle, the descriptor of the driver and the mapping are tried. In the
 * end nobody holds a page any more: F_SEAL_WRITE would be refused, and the books would differ.
 *
 * VM: MEM=2048 SMP=2
 */

#include "promise.h"
#include "drm.h"

/* Two folios of the larger kinds. */
#define SIZE (2 * HUGE)
#define PAGES (SIZE / PAGE)

enum { THE_USER = 1, THE_IMPORTER };

FIXTURE(importer)
{
	struct books before;
	int memfd;
	char *mem;
	int vgem;
};

FIXTURE_VARIANT(importer)
{
	const struct kind *kind;
};

FIXTURE_VARIANT_ADD(importer, shmem) { .kind = &shmem };
FIXTURE_VARIANT_ADD(importer, shmem_thp) { .kind = &shmem_thp };
FIXTURE_VARIANT_ADD(importer, hugetlb) { .kind = &hugetlb };

#define SKIP_IN_SETUP(reason) SKIP(LEAVE_SETUP, reason)

FIXTURE_SETUP(importer)
{
	self->vgem = drm_open("vgem", NULL);
	if (self->vgem < 0)
		SKIP_IN_SETUP("no vgem");
	close(self->vgem);
	self->before = read_books();
	self->vgem = drm_open("vgem", NULL);
	self->memfd = new_memfd(variant->kind, SIZE);
	ASSERT_LE(0, self->memfd);
	self->mem = map_fd(self->memfd, SIZE, PROT_READ | PROT_WRITE);
	ASSERT_NE(NULL, self->mem);
}

/* Whatever is still there: what a failed case left, too. */
static void drop_everything(void)
{
	struct {
		char *start, *end;
	} areas[64];
	unsigned int n = 0;
	char line[512];
	FILE *f = fopen("/proc/self/maps", "re");

	while (f && n < ARRAY_SIZE(areas) && fgets(line, sizeof(line), f))
		if ((strstr(line, MEMFD_NAME) && strstr(line, "/memfd:")) || strstr(line, "/dmabuf:"))
			n += sscanf(line, "%p-%p", (void **)&areas[n].start,
				    (void **)&areas[n].end) == 2;
	if (f)
		fclose(f);
	while (n--)
		munmap(areas[n].start, areas[n].end - areas[n].start);
	for (int fd = 3; fd < 256; fd++)
		close(fd);
}

FIXTURE_TEARDOWN(importer)
{
	drop_everything();
	/* The harness had some descriptors; this closed them as well. */
	self->before.fds = open_fds();
	EXPECT_SAME_BOOKS(self->before);
}

/* Sealing against writes is refused while somebody holds on to a page. Ends @mem. */
static int seal(int memfd, char *mem)
{
	if (mem)
		munmap(mem, SIZE);
	return fcntl(memfd, F_ADD_SEALS, F_SEAL_WRITE) ? -errno : 0;
}

struct import {
	int buffer;
	__u32 handle;
	char *map;
};

/* Imports, and maps through the importer's descriptor. An errno, or 0. */
static int import(int drm, int buffer, size_t size, int prot, struct import *to)
{
	__u64 offset = drm_next_offset(drm, size);
	long handle = drm_import(drm, buffer);

	if (handle <= 0)
		return handle ? handle : -ENXIO;
	*to = (struct import) {
		.buffer = buffer, .handle = handle, .map = drm_map(drm, offset, size, prot),
	};
	return to->map ? 0 : -errno;
}

#define RW (PROT_READ | PROT_WRITE)

/* A buffer of all the memory, imported by vgem and mapped there. */
#define ASSERT_IMPORTED(size, to) do { \
	int buffer_ = create(self->memfd, 0, size); \
	ASSERT_LE(0, buffer_); \
	/* Else touching what is mapped would be the end of this machine. */ \
	if (variant->kind->pool) \
		ASSERT_TRUE(maps_frames(buffer_)); \
	ASSERT_EQ(0, import(self->vgem, buffer_, size, RW, to)); \
} while (0)

TEST_F(importer, sees_the_memory)
{
	struct import imp;

	fill(self->mem, 0, PAGES, THE_USER);
	ASSERT_IMPORTED(SIZE, &imp);
	EXPECT_EQ(0, wrong(imp.map, 0, PAGES, THE_USER));

	fill(imp.map, 0, PAGES, THE_IMPORTER);
	EXPECT_EQ(0, wrong(self->mem, 0, PAGES, THE_IMPORTER));
	fill(self->mem, 0, PAGES, THE_USER);
	EXPECT_EQ(0, wrong(imp.map, 0, PAGES, THE_USER));

	EXPECT_EQ(-EBUSY, seal(self->memfd, self->mem));
	munmap(imp.map, SIZE);
	EXPECT_EQ(0, drm_close_handle(self->vgem, imp.handle));
	close(imp.buffer);
	EXPECT_EQ(0, seal(self->memfd, NULL));
}

TEST_F(importer, fills_holes)
{
	struct import imp;

	ASSERT_IMPORTED(SIZE, &imp);
	for (size_t i = 0; i < SIZE / sizeof(__u64); i += 61)
		ASSERT_EQ(0ULL, ((__u64 *)imp.map)[i]);
	fill(imp.map, 0, PAGES, THE_IMPORTER);
	EXPECT_EQ(0, wrong(self->mem, 0, PAGES, THE_IMPORTER));
}

/* Ranges of one memfd, in no order, some of them twice, none at a folio's boundary. */
TEST_F(importer, list_of_ranges)
{
	static const struct {
		size_t first, pages;
	} ranges[] = {
		{ 700, 64 }, { 3, 1 }, { 500, 24 }, { 0, 5 }, { 1023, 1 }, { 3, 1 }, { 512, 512 },
	};
	struct {
		struct udmabuf_create_list head;
		struct udmabuf_create_item items[ARRAY_SIZE(ranges)];
	} arg = { .head = { .flags = UDMABUF_FLAGS_CLOEXEC, .count = ARRAY_SIZE(ranges) } };
	int dev = open("/dev/udmabuf", O_RDWR | O_CLOEXEC), buffer;
	struct import imp;
	size_t pages = 0;

	fill(self->mem, 0, PAGES, THE_USER);
	for (unsigned int i = 0; i < ARRAY_SIZE(ranges); i++) {
		arg.items[i].memfd = self->memfd;
		arg.items[i].offset = ranges[i].first * PAGE;
		arg.items[i].size = ranges[i].pages * PAGE;
		pages += ranges[i].pages;
	}
	buffer = ioctl(dev, UDMABUF_CREATE_LIST, &arg);
	ASSERT_LE(0, buffer);
	if (variant->kind->pool)
		ASSERT_TRUE(maps_frames(buffer));
	ASSERT_EQ(0, import(self->vgem, buffer, pages * PAGE, RW, &imp));
	pages = 0;
	for (unsigned int i = 0; i < ARRAY_SIZE(ranges); i++) {
		char *at = imp.map + pages * PAGE;

		EXPECT_EQ(0, wrong(at, ranges[i].first, ranges[i].pages, THE_USER));
		fill(at, ranges[i].first, ranges[i].pages, THE_IMPORTER);
		EXPECT_EQ(0, wrong(self->mem + ranges[i].first * PAGE, ranges[i].first,
				   ranges[i].pages, THE_IMPORTER));
		fill(at, ranges[i].first, ranges[i].pages, THE_USER);
		pages += ranges[i].pages;
	}
	close(dev);
}

/* What the memfd, the buffer and the importer refuse, an imported buffer refuses too. */
TEST_F(importer, refuses)
{
	int other = drm_open("vgem", NULL);
	struct import imp;
	char *part;
	__u64 offset, ignored;

	ASSERT_IMPORTED(HUGE, &imp);
	munmap(imp.map, HUGE);
	EXPECT_EQ(0, drm_close_handle(self->vgem, imp.handle));
	EXPECT_EQ(-ENOENT, drm_offset_of(self->vgem, imp.handle, &ignored));

	offset = drm_next_offset(self->vgem, HUGE);
	imp.handle = drm_import(self->vgem, imp.buffer);
	EXPECT_EQ(-EINVAL, drm_offset_of(self->vgem, imp.handle, &ignored));
	/* Too long; private; by a descriptor that has not imported it. */
	EXPECT_EQ(NULL, drm_map(self->vgem, offset, HUGE + PAGE, RW));
	EXPECT_EQ(EINVAL, errno);
	EXPECT_EQ(MAP_FAILED, mmap(NULL, HUGE, RW, MAP_PRIVATE, self->vgem, offset));
	EXPECT_EQ(EINVAL, errno);
	EXPECT_EQ(NULL, drm_map(other, offset, HUGE, RW));
	EXPECT_EQ(EACCES, errno);
	/* A part of it, from its beginning, is all right. */
	part = drm_map(self->vgem, offset, 3 * PAGE, RW);
	ASSERT_NE(NULL, part);
	fill(part, 0, 3, THE_IMPORTER);
	EXPECT_EQ(0, wrong(self->mem, 0, 3, THE_IMPORTER));
	/* And it does not grow. */
	EXPECT_EQ(MAP_FAILED, mremap(part, 3 * PAGE, 5 * PAGE, MREMAP_MAYMOVE));
	close(other);
}

TEST_F(importer, imported_twice)
{
	struct import first, second;
	long again;
	int other;

	fill(self->mem, 0, PAGES, THE_USER);
	ASSERT_IMPORTED(SIZE, &first);
	again = drm_import(self->vgem, first.buffer);
	EXPECT_EQ(first.handle, again);
	EXPECT_EQ(0, drm_close_handle(self->vgem, first.handle));
	EXPECT_EQ(-EINVAL, drm_close_handle(self->vgem, first.handle));
	EXPECT_EQ(0, wrong(first.map, 0, PAGES, THE_USER));

	/* Another descriptor is another attachment, of the same memory. */
	other = drm_open("vgem", NULL);
	ASSERT_LE(0, other);
	EXPECT_LT(0, drm_import(self->vgem, first.buffer));
	ASSERT_EQ(0, import(other, first.buffer, SIZE, RW, &second));
	fill(second.map, 0, PAGES, THE_IMPORTER);
	EXPECT_EQ(0, wrong(first.map, 0, PAGES, THE_IMPORTER));
	close(other);
	close(self->vgem);
	EXPECT_EQ(0, wrong(second.map, 0, PAGES, THE_IMPORTER));
	munmap(second.map, SIZE);
	munmap(first.map, SIZE);
	EXPECT_EQ(-EBUSY, seal(self->memfd, self->mem));
	close(first.buffer);
	EXPECT_EQ(0, seal(self->memfd, NULL));
}

TEST_F(importer, exported_again)
{
	struct stat here, there;
	struct import imp;
	int again;
	char *map;

	fill(self->mem, 0, PAGES, THE_USER);
	ASSERT_IMPORTED(SIZE, &imp);
	again = drm_export(self->vgem, imp.handle);
	ASSERT_LE(0, again);
	ASSERT_EQ(0, fstat(imp.buffer, &here));
	ASSERT_EQ(0, fstat(again, &there));
	EXPECT_EQ(here.st_ino, there.st_ino);
	EXPECT_EQ((off_t)SIZE, lseek(again, 0, SEEK_END));

	/* It is the buffer, also when its first descriptor and the import have gone. */
	munmap(imp.map, SIZE);
	close(imp.buffer);
	EXPECT_EQ(0, drm_close_handle(self->vgem, imp.handle));
	EXPECT_EQ(0, sync_buffer(again, DMA_BUF_SYNC_START | DMA_BUF_SYNC_RW));
	map = map_fd(again, SIZE, RW);
	ASSERT_NE(NULL, map);
	EXPECT_EQ(0, wrong(map, 0, PAGES, THE_USER));
	EXPECT_EQ(0, sync_buffer(again, DMA_BUF_SYNC_END | DMA_BUF_SYNC_RW));
	munmap(map, SIZE);

	/* A second device can import what the first has exported. */
	EXPECT_LT(0, drm_import(self->vgem, again));
	close(again);
	close(self->vgem);
	EXPECT_EQ(0, seal(self->memfd, self->mem));
}

/*
 * Five users of the memory can go in 120 orders. After each step, who is left sees the memory as
 * it was, and in the end nobody holds it.
 */
enum { MEMFD, BUFFER, HANDLE, DRM, MAP, USERS };

#define ORDERED_SIZE HUGE
#define ORDERED_PAGES (ORDERED_SIZE / PAGE)

static void next_order(int *order)
{
	int i = USERS - 2, j = USERS - 1, low, high, swap;

	while (i >= 0 && order[i] > order[i + 1])
		i--;
	if (i < 0)
		return;
	while (order[j] < order[i])
		j--;
	swap = order[i], order[i] = order[j], order[j] = swap;
	for (low = i + 1, high = USERS - 1; low < high; low++, high--)
		swap = order[low], order[low] = order[high], order[high] = swap;
}

TEST_F(importer, released_in_any_order)
{
	int order[USERS] = { 0, 1, 2, 3, 4 };
	int runs = 0;

	for (; runs < 120; runs++, next_order(order)) {
		int memfd = new_memfd(variant->kind, ORDERED_SIZE);
		char *mem = map_fd(memfd, ORDERED_SIZE, RW), *left[2];
		int vgem = drm_open("vgem", NULL), buffer;
		struct import imp;
		unsigned int gone = 0;

		ASSERT_NE(NULL, mem);
		fill(mem, 0, ORDERED_PAGES, runs);
		buffer = create(memfd, 0, ORDERED_SIZE);
		ASSERT_LE(0, buffer);
		if (variant->kind->pool)
			ASSERT_TRUE(maps_frames(buffer));
		ASSERT_EQ(0, import(vgem, buffer, ORDERED_SIZE, RW, &imp));
		for (int step = 0; step < USERS; step++) {
			switch (order[step]) {
			case MEMFD:
				munmap(mem, ORDERED_SIZE);
				close(memfd);
				break;
			case BUFFER:
				close(buffer);
				break;
			case HANDLE:
				if (!(gone & 1 << DRM))
					EXPECT_EQ(0, drm_close_handle(vgem, imp.handle));
				break;
			case DRM:
				close(vgem);
				break;
			case MAP:
				munmap(imp.map, ORDERED_SIZE);
				break;
			}
			gone |= 1 << order[step];
			/* Who is left sees what was written last, and writes the next. */
			left[0] = gone & 1 << MEMFD ? NULL : mem;
			left[1] = gone & 1 << MAP ? NULL : imp.map;
			for (int i = 0; i < 2; i++)
				if (left[i])
					EXPECT_EQ(0, wrong(left[i], 0, ORDERED_PAGES, runs + step));
			if (left[0] || left[1])
				fill(left[1] ?: left[0], 0, ORDERED_PAGES, runs + step + 1);
		}
		if (runs % 30 == 29)
			EXPECT_EQ(self->before.pins, pins());
	}
	printf("# %d orders\n", runs);
}

/* The memory that the importer wrote to is swapped out as soon as nobody holds it any more. */
TEST_F(importer, written_is_kept)
{
	struct import imp;
	char *mem;

	munmap(self->mem, SIZE);
	ASSERT_IMPORTED(SIZE, &imp);
	fill(imp.map, 0, PAGES, THE_IMPORTER);
	munmap(imp.map, SIZE);
	close(self->vgem);
	close(imp.buffer);

	/* Readable only: with a PTE that is writable, reclaim would find it dirty. */
	mem = map_fd(self->memfd, SIZE, PROT_READ);
	ASSERT_NE(NULL, mem);
	for (int pass = 0; pass < 2; pass++) {
		EXPECT_EQ(0, wrong(mem, 0, PAGES, THE_IMPORTER));
		madvise(mem, SIZE, MADV_PAGEOUT);
	}
	EXPECT_EQ(0, wrong(mem, 0, PAGES, THE_IMPORTER));
}

#define KPF_DIRTY 4
#define KPF_COMPOUND_TAIL 16

/* How many of the folios mapped at @at are dirty; in @folios how many there are. */
static int dirty_folios(const char *at, size_t size, int *folios)
{
	int fd = open("/proc/kpageflags", O_RDONLY | O_CLOEXEC), dirty = 0;

	*folios = 0;
	for (size_t offset = 0; offset < size; offset += PAGE) {
		__u64 pfn, flags;
		char c = *(volatile const char *)(at + offset);

		(void)c;
		pfn = pfn_of(at + offset);
		if (pread(fd, &flags, sizeof(flags), pfn * sizeof(flags)) != sizeof(flags)) {
			dirty = -1;
			break;
		}
		if (flags & 1ULL << KPF_COMPOUND_TAIL)
			continue;
		++*folios;
		dirty += !!(flags & 1ULL << KPF_DIRTY);
	}
	close(fd);
	return dirty;
}

/*
 * A device writes without the CPU knowing. vgem has none, so look at what reclaim would look at:
 * whoever maps an attachment from-device leaves all of it dirty.
 */
TEST_F(importer, attached_is_dirty)
{
	int buffer, folios;
	char *mem;

	/* There, DRM_GEM_SHMEM_DRIVER_OPS imports by drm_gem_shmem_prime_import_no_map(). */
	if (!variant->kind->pool && kernel_is(7, 0))
		SKIP(return, "vgem of this kernel maps nothing when it imports");
	buffer = create(self->memfd, 0, SIZE);
	ASSERT_LE(0, buffer);
	munmap(self->mem, SIZE);
	mem = map_fd(self->memfd, SIZE, PROT_READ);
	ASSERT_NE(NULL, mem);
	/* Filling a hole leaves it clean, or this would show nothing. hugetlb is never clean. */
	EXPECT_EQ(0, dirty_folios(mem, SIZE, &folios) * !variant->kind->pool);
	ASSERT_LT(0, drm_import(self->vgem, buffer));
	close(buffer);
	close(self->vgem);
	EXPECT_EQ(folios, dirty_folios(mem, SIZE, &folios));
}

/* A process with all of it is killed: nothing of it stays. */
TEST_F(importer, killed)
{
	struct screen screen;
	int ready[2];
	pid_t child;
	char c;

	ASSERT_EQ(0, pipe(ready));
	child = fork();
	if (!child) {
		int buffer = create(self->memfd, 0, SIZE);
		struct import imp;
		long fb = -1;

		if (buffer >= 0 && (!variant->kind->pool || maps_frames(buffer)) &&
		    !import(self->vgem, buffer, SIZE, RW, &imp) && screen_open(&screen)) {
			fill(imp.map, 0, PAGES, THE_IMPORTER);
			fb = screen_add(&screen, drm_import(screen.drm, buffer), PAGES);
		}
		c = fb > 0 && !screen_on(&screen, fb, PAGES);
		if (write(ready[1], &c, 1) == 1)
			pause();
		_exit(0);
	}
	close(ready[1]);
	EXPECT_EQ(1, read(ready[0], &c, 1));
	EXPECT_EQ(1, c);
	kill(child, SIGKILL);
	ASSERT_EQ(child, waitpid(child, NULL, 0));
	/* The child's import was through a descriptor that it had from here. */
	close(self->vgem);
	EXPECT_EQ(0, wrong(self->mem, 0, PAGES, THE_IMPORTER));
	EXPECT_EQ(0, seal(self->memfd, self->mem));
}

/* The pixels are at the beginning of each page, for the screen to have one in each line. */
static void paint(char *at, unsigned int lines, unsigned int who)
{
	for (unsigned int y = 0; y < lines; y++)
		for (unsigned int x = 0; x < LINE_PIXELS; x++)
			((__u32 *)(at + y * PAGE))[x] = stamp(0, y * LINE_PIXELS + x) >> (8 * who);
}

/* vmap: the kernel itself reads the pixels of the memfd, in the order of the buffer. */
TEST_F(importer, kernel_reads_it)
{
	struct screen screen;
	long handle, fb;
	int buffer;
	char *map;

	if (!screen_open(&screen))
		SKIP(return, "no vkms");
	paint(self->mem, PAGES, 1);
	buffer = create(self->memfd, 0, SIZE);
	ASSERT_LE(0, buffer);
	handle = drm_import(screen.drm, buffer);
	ASSERT_LT(0, handle);
	fb = screen_add(&screen, handle, PAGES);
	ASSERT_LT(0, fb);
	ASSERT_EQ(0, screen_on(&screen, fb, PAGES));
	EXPECT_TRUE(screen_shows(&screen, crc_of(self->mem, PAGES)));

	paint(self->mem, PAGES, 2);
	EXPECT_TRUE(screen_shows(&screen, crc_of(self->mem, PAGES)));
	if (variant->kind->pool)
		ASSERT_TRUE(maps_frames(buffer));
	map = map_fd(buffer, SIZE, RW);
	ASSERT_NE(NULL, map);
	paint(map, PAGES, 3);
	munmap(map, SIZE);
	EXPECT_TRUE(screen_shows(&screen, crc_of(self->mem, PAGES)));

	/* It goes on when all but the screen have let go. */
	close(buffer);
	EXPECT_EQ(0, drm_close_handle(screen.drm, handle));
	((__u32 *)(self->mem + (PAGES - 1) * PAGE))[LINE_PIXELS - 1] ^= 1;
	EXPECT_TRUE(screen_shows(&screen, crc_of(self->mem, PAGES)));
	EXPECT_EQ(-EBUSY, seal(self->memfd, self->mem));

	EXPECT_EQ(0, screen_off(&screen));
	EXPECT_EQ(0, screen_remove(&screen, fb));
	EXPECT_EQ(0, seal(self->memfd, NULL));
}

TEST_F(importer, kernel_reads_a_list)
{
	struct {
		struct udmabuf_create_list head;
		struct udmabuf_create_item items[3];
	} arg = { .head = { .flags = UDMABUF_FLAGS_CLOEXEC, .count = 3 } };
	static const size_t first[] = { 900, 1, 505 }, pages[] = { 33, 2, 14 };
	int dev = open("/dev/udmabuf", O_RDWR | O_CLOEXEC), buffer;
	unsigned int lines = 0;
	struct screen screen;
	char *shown;
	long fb;

	if (!screen_open(&screen))
		SKIP(return, "no vkms");
	paint(self->mem, PAGES, 1);
	shown = malloc(49 * PAGE);
	for (int i = 0; i < 3; i++) {
		arg.items[i] = (struct udmabuf_create_item) {
			.memfd = self->memfd, .offset = first[i] * PAGE, .size = pages[i] * PAGE,
		};
		memcpy(shown + lines * PAGE, self->mem + first[i] * PAGE, pages[i] * PAGE);
		lines += pages[i];
	}
	buffer = ioctl(dev, UDMABUF_CREATE_LIST, &arg);
	ASSERT_LE(0, buffer);
	fb = screen_add(&screen, drm_import(screen.drm, buffer), lines);
	ASSERT_LT(0, fb);
	ASSERT_EQ(0, screen_on(&screen, fb, lines));
	EXPECT_TRUE(screen_shows(&screen, crc_of(shown, lines)));
	free(shown);
	/* The descriptor of the driver is closed while the buffer is on the screen. */
	close(screen.drm);
	close(buffer);
	EXPECT_EQ(0, seal(self->memfd, self->mem));
}

#define RACERS 4
#define ROUNDS 60

struct racer {
	int memfd, buffer;
	const struct kind *kind;
	unsigned int seed;
	long bad;
};

/* Imports the buffer that all share, by a descriptor of its own, over and over. */
static void *race(void *data)
{
	struct racer *racer = data;

	for (int round = 0; round < ROUNDS; round++) {
		int vgem = drm_open("vgem", NULL);
		long handle = drm_import(vgem, racer->buffer);
		int again = drm_export(vgem, handle);
		size_t page = rand_r(&racer->seed) % PAGES;
		char *map;

		racer->bad += handle <= 0 || again < 0;
		if (round % 2)
			close(vgem);
		map = mmap(NULL, SIZE, RW, MAP_SHARED, again, 0);
		if (map == MAP_FAILED) {
			racer->bad++;
		} else {
			racer->bad += wrong(map + page * PAGE, page, 1, THE_USER);
			sync_buffer(again, DMA_BUF_SYNC_START | DMA_BUF_SYNC_RW);
			munmap(map, SIZE);
		}
		close(again);
		if (!(round % 2))
			close(vgem);
	}
	return NULL;
}

TEST_F(importer, all_at_once)
{
	int buffer = create(self->memfd, 0, SIZE);
	struct racer racers[RACERS];
	pthread_t threads[RACERS];

	ASSERT_LE(0, buffer);
	if (variant->kind->pool)
		ASSERT_TRUE(maps_frames(buffer));
	fill(self->mem, 0, PAGES, THE_USER);
	for (int i = 0; i < RACERS; i++) {
		racers[i] = (struct racer) {
			.buffer = buffer, .memfd = self->memfd, .kind = variant->kind, .seed = i + 1,
		};
		ASSERT_EQ(0, pthread_create(&threads[i], NULL, race, &racers[i]));
	}
	for (int i = 0; i < RACERS; i++) {
		pthread_join(threads[i], NULL);
		EXPECT_EQ(0, racers[i].bad);
	}
	close(buffer);
	EXPECT_EQ(0, seal(self->memfd, self->mem));
	printf("# seeds 1 to %d, %d imports\n", RACERS, RACERS * ROUNDS);
}

TEST_HARNESS_MAIN
