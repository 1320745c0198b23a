// SPDX-License-Identifier: GPL-2.0
/*
 * Promised: a buffer shows the range of the file that was asked for, wherever in the file that is,
 * or the request fails with an errno. Offsets have 64 bits everywhere, but the index of a page has
 * only 32 on a 32-bit kernel, and the largest file ends where indexes do. A user whose offset lost
 * its upper bits would get a buffer of somebody else's place in the file.
 *
 * So the cases put buffers above 4 GiB, across it, on the last page that a file can have and past
 * it, in sparse files, and look through the memfd which pages came into being. They also run as a
 * 32-bit program on a 32-bit kernel, and on pages of 64 KiB.
 *
 * VM: MEM=2048 SMP=1
 */
#define _FILE_OFFSET_BITS 64
#include "promise.h"

/* promise.h takes pages of 4 KiB for granted. */
#undef PAGE
#define PAGE ((size_t)getpagesize())

#define PMD_SIZE "/sys/kernel/mm/transparent_hugepage/hpage_pmd_size"

#define FOUR_GIB (1LL << 32)
#define FILE_SIZE (6LL << 30)
#define END_OF_32_BITS ((off_t)UINT32_MAX * (off_t)PAGE / (off_t)HUGE * (off_t)HUGE)

/* The largest file: MAX_LFS_FILESIZE of a kernel that has as many bits as the program. */
static off_t largest_file(void)
{
	return sizeof(long) == 8 ? LLONG_MAX : (off_t)UINT32_MAX * (off_t)PAGE;
}

/* The word that page @n of the file is to begin with. */
static __u64 word_of(__u64 n)
{
	return (n + 1) * 0x9e3779b97f4a7c15ULL;
}

static char *view(int fd, off_t offset, size_t size)
{
	char *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, offset);

	return at == MAP_FAILED ? NULL : at;
}

static void write_words(char *at, off_t offset, size_t size)
{
	for (size_t i = 0; i < size; i += PAGE)
		*(__u64 *)(at + i) = word_of((offset + i) / PAGE);
}

static int wrong_words(const char *at, off_t offset, size_t size)
{
	int bad = 0;

	for (size_t i = 0; i < size; i += PAGE)
		bad += *(const __u64 *)(at + i) != word_of((offset + i) / PAGE);
	return bad;
}

/* Bytes of the file that are not a hole. */
static off_t present(int memfd)
{
	struct stat st;

	return fstat(memfd, &st) ? -1 : (off_t)st.st_blocks * 512;
}

FIXTURE(offsets) {
	struct books before;
	const struct kind *kind;
	size_t folio;
	size_t size;		/* of a buffer */
	int memfd;
};

FIXTURE_VARIANT(offsets) {
	const struct kind *kind;
};

FIXTURE_VARIANT_ADD(offsets, shmem) { .kind = &shmem };

FIXTURE_VARIANT_ADD(offsets, shmem_thp) { .kind = &shmem_thp };

FIXTURE_VARIANT_ADD(offsets, hugetlb) { .kind = &hugetlb };

FIXTURE_SETUP(offsets)
{
	self->kind = variant->kind;
	self->folio = variant->kind == &shmem ? PAGE : variant->kind->page;
	self->size = variant->kind == &shmem ? 16 * PAGE : 2 * HUGE;
	if (variant->kind == &shmem_thp && value_of(PMD_SIZE, "") != HUGE)
		SKIP(LEAVE_SETUP, "no transparent huge pages of 2 MiB");
	if (variant->kind->pool && pool_value(POOL_2M, "free_hugepages") < 8)
		SKIP(LEAVE_SETUP, "fewer than 8 free huge pages");
	self->before = read_books();
	self->memfd = new_memfd(variant->kind, 0);
	ASSERT_LE(0, self->memfd);
}

FIXTURE_TEARDOWN(offsets)
{
	close(self->memfd);
	EXPECT_SAME_BOOKS(self->before);
}

/*
 * A buffer of a hole at @offset of a file of @file_size: it is that range of the file, and of the
 * file there is nothing else.
 */
static void check_range(struct __test_metadata *_metadata, FIXTURE_DATA(offsets) *self,
			off_t file_size, off_t offset, size_t size)
{
	/* hugetlb is mapped in whole pages only. */
	size_t skip = offset % self->folio;
	size_t whole = (skip + size + self->folio - 1) / self->folio * self->folio;
	char *map, *mem;
	int buffer;

	ASSERT_EQ(0, ftruncate(self->memfd, file_size));
	buffer = create(self->memfd, offset, size);
	ASSERT_LE(0, buffer);
	EXPECT_EQ((off_t)whole, present(self->memfd));

	map = view(buffer, 0, size);
	ASSERT_NE(NULL, map);
	write_words(map, offset, size);
	munmap(map, size);
	mem = view(self->memfd, offset - skip, whole);
	ASSERT_NE(NULL, mem);
	EXPECT_EQ(0, wrong_words(mem + skip, offset, size));
	munmap(mem, whole);
	close(buffer);
}

TEST_F(offsets, above_4_gib)
{
	check_range(_metadata, self, FILE_SIZE, FOUR_GIB + (1LL << 30), self->size);
}

TEST_F(offsets, across_4_gib)
{
	check_range(_metadata, self, FILE_SIZE, FOUR_GIB - self->size / 2, self->size);
}

/* Inside of a huge page, where the kind has any. */
TEST_F(offsets, above_4_gib_by_a_page)
{
	check_range(_metadata, self, FILE_SIZE, FOUR_GIB + PAGE, self->size - 2 * PAGE);
}

/* Where the index of the page fills 32 bits: the end of files on a 32-bit kernel. */
TEST_F(offsets, last_index_of_32_bits)
{
	check_range(_metadata, self, END_OF_32_BITS, END_OF_32_BITS - self->size, self->size);
}

TEST_F(offsets, above_index_of_32_bits)
{
	off_t start = (off_t)(1ULL << 32) * (off_t)PAGE;

	if (sizeof(long) == 4)
		SKIP(return, "no file is so large on a 32-bit kernel");
	check_range(_metadata, self, start + (1LL << 30), start, self->size);
}

/* The last folio that lies in a file in whole. */
TEST_F(offsets, end_of_largest_file)
{
	off_t end = largest_file() / (off_t)self->folio * (off_t)self->folio;

	check_range(_metadata, self, end, end - self->folio, self->folio);
}

/* Where LLONG_MAX ends the largest file, its last page is one byte short. */
TEST(last_page_of_largest_file)
{
	off_t start = (largest_file() - 1) / (off_t)PAGE * (off_t)PAGE;
	int memfd = new_memfd(&shmem, 0), buffer;
	char *map, *mem;

	ASSERT_EQ(0, ftruncate(memfd, largest_file()));
	buffer = create(memfd, start, PAGE);
	ASSERT_LE(0, buffer);
	map = view(buffer, 0, PAGE);
	ASSERT_NE(NULL, map);
	write_words(map, start, PAGE);
	EXPECT_EQ((off_t)PAGE, present(memfd));
	mem = view(memfd, start, PAGE);
	/* The last page of 64 bits cannot be mapped: its end is no offset. */
	if (mem)
		EXPECT_EQ(0, wrong_words(mem, start, PAGE));
}

/* No part of an offset may get lost, and nothing of the file come into being. */
TEST_F(offsets, past_the_end)
{
	const __u64 file_size = 4 * HUGE;
	const __u64 offsets[] = {
		file_size,
		file_size - self->size / 2,
		1ULL << 31, 1ULL << 32, 1ULL << 43, 1ULL << 44, 1ULL << 48, 1ULL << 62,
		(1ULL << 32) * PAGE,		/* index 0 in 32 bits */
		(1ULL << 32) * PAGE - self->size / 2,
		(1ULL << 63) - self->size,
		(1ULL << 63) - self->size / 2,	/* ends past LLONG_MAX */
		1ULL << 63,
		-(__u64)self->size,
		-(__u64)(self->size / 2),	/* ends past 2^64 */
	};

	ASSERT_EQ(0, ftruncate(self->memfd, file_size));
	for (size_t i = 0; i < sizeof(offsets) / sizeof(*offsets); i++) {
		int buffer = create(self->memfd, offsets[i], self->size);

		EXPECT_TRUE(buffer == -EINVAL || buffer == -EFBIG)
			TH_LOG("offset %#llx gives %d", (unsigned long long)offsets[i], buffer);
		if (buffer >= 0)
			close(buffer);
	}
	EXPECT_GE((off_t)self->size, present(self->memfd));
}

/* A size in bytes, or in pages, that does not fit into 32 or 64 bits. */
TEST_F(offsets, too_large)
{
	const __u64 sizes[] = {
		1ULL << 32, 1ULL << 43, 1ULL << 44, (1ULL << 44) + PAGE, (1ULL << 32) * PAGE,
		(1ULL << 32) * PAGE + self->size, 1ULL << 63, -(__u64)PAGE,
	};

	ASSERT_EQ(0, ftruncate(self->memfd, 4 * HUGE));
	for (size_t i = 0; i < sizeof(sizes) / sizeof(*sizes); i++) {
		int buffer = create(self->memfd, 0, sizes[i]);

		EXPECT_EQ(-EINVAL, buffer)
			TH_LOG("size %#llx", (unsigned long long)sizes[i]);
		if (buffer >= 0)
			close(buffer);
	}
}

/* Each item is small enough, and their sum is in 32 or 64 bits, in bytes or in pages. */
TEST_F(offsets, too_large_in_sum)
{
	const __u64 halves[] = { 1ULL << 31, 1ULL << 43, (1ULL << 31) * PAGE, 1ULL << 63 };
	struct udmabuf_create_item items[3];

	ASSERT_EQ(0, ftruncate(self->memfd, 4 * HUGE));
	for (size_t i = 0; i < sizeof(halves) / sizeof(*halves); i++) {
		items[0] = (struct udmabuf_create_item) {
			.memfd = self->memfd, .size = halves[i],
		};
		items[1] = items[0];
		items[2] = (struct udmabuf_create_item) { .memfd = self->memfd, .size = self->size };
		EXPECT_EQ(-EINVAL, create_list(items, 3))
			TH_LOG("twice %#llx", (unsigned long long)halves[i]);
	}
}

/* Pages that the kernel has allocated since it booted. */
static long pages_allocated(void)
{
	FILE *f = fopen("/proc/vmstat", "re");
	long pages = 0, more;
	char line[256];

	while (f && fgets(line, sizeof(line), f))
		if (sscanf(line, "pgalloc_%*s %ld", &more) == 1)
			pages += more;
	if (f)
		fclose(f);
	return pages;
}

/* However large it is, what is no memfd costs nothing. */
TEST_F(offsets, refused_takes_no_memory)
{
	__u64 size = sizeof(long) == 8 ? 64ULL * GIB : GIB;
	int fd = open("/dev/null", O_RDWR | O_CLOEXEC);
	long before = pages_allocated();

	ASSERT_LE(0, fd);
	ASSERT_LT(0, before);
	EXPECT_EQ(-EBADFD, create(fd, 0, size));
	/* 256 MiB, if there are as little as 16 bytes for each page. */
	EXPECT_GT((long)(32 * MIB / PAGE), pages_allocated() - before);
	close(fd);
}

/* Nor does it make the kernel warn of an allocation that no one should ask for. */
TEST(refused_without_a_warning)
{
	int fd = open("/dev/null", O_RDWR | O_CLOEXEC);

	if (sizeof(long) == 4 || PAGE != 4096)
		SKIP(return, "it takes 64 bits and pages of 4 KiB to ask for so many");
	ASSERT_LE(0, fd);
	quiet_kernel();
	ASSERT_LE(0, quiet_kmsg);
	EXPECT_EQ(-EBADFD, create(fd, 0, 1024ULL * GIB));
	EXPECT_EQ(0, complaints());
	close(fd);
}

/* A small page has room for a million pins, and for the references of others. */
TEST_F(offsets, one_page_too_often)
{
	static struct udmabuf_create_item items[1024];
	static int buffers[2100];
	struct rlimit files = { 4096, 4096 };
	unsigned int n = 0;
	char *mem;

	if (self->kind != &shmem)
		SKIP(return, "a large folio counts its pins apart");
	ASSERT_EQ(0, ftruncate(self->memfd, PAGE));
	ASSERT_EQ(0, setrlimit(RLIMIT_NOFILE, &files));
	mem = view(self->memfd, 0, PAGE);
	ASSERT_NE(NULL, mem);
	write_words(mem, 0, PAGE);
	for (size_t i = 0; i < ARRAY_SIZE(items); i++)
		items[i] = (struct udmabuf_create_item) { .memfd = self->memfd, .size = PAGE };
	while (n < ARRAY_SIZE(buffers) - 1 &&
	       (buffers[n] = create_list(items, ARRAY_SIZE(items))) >= 0)
		n++;
	EXPECT_EQ(-ENOMEM, buffers[n]);
	TH_LOG("%u buffers of %zu times the page", n, ARRAY_SIZE(items));
	EXPECT_EQ(0, wrong_words(mem, 0, PAGE));
	while (n)
		close(buffers[--n]);
	buffers[0] = create(self->memfd, 0, PAGE);
	EXPECT_LE(0, buffers[0]);
	close(buffers[0]);
	munmap(mem, PAGE);
}

/* Ranges that lie far apart in the file lie side by side in the buffer. */
TEST_F(offsets, far_apart_in_a_list)
{
	off_t end = largest_file() / (off_t)self->folio * (off_t)self->folio;
	const off_t starts[] = { FOUR_GIB, 0, end - self->folio, FOUR_GIB - self->folio };
	struct udmabuf_create_item items[4];
	size_t size = 4 * self->folio;
	char *map, *mem;
	int buffer;

	ASSERT_EQ(0, ftruncate(self->memfd, end));
	for (int i = 0; i < 4; i++)
		items[i] = (struct udmabuf_create_item) {
			.memfd = self->memfd, .offset = starts[i], .size = self->folio,
		};
	buffer = create_list(items, 4);
	ASSERT_LE(0, buffer);
	map = view(buffer, 0, size);
	ASSERT_NE(NULL, map);
	for (int i = 0; i < 4; i++)
		write_words(map + i * self->folio, starts[i], self->folio);
	munmap(map, size);
	for (int i = 0; i < 4; i++) {
		mem = view(self->memfd, starts[i], self->folio);
		ASSERT_NE(NULL, mem);
		EXPECT_EQ(0, wrong_words(mem, starts[i], self->folio));
		munmap(mem, self->folio);
	}
	close(buffer);
}

/* A buffer cannot be mapped past its end, wherever that wraps around. */
TEST_F(offsets, map_past_the_buffer)
{
	const __u64 offsets[] = {
		self->size, 1ULL << 32, (1ULL << 32) * PAGE - PAGE, (1ULL << 43),
		(1ULL << 63) - PAGE,
	};
	int buffer;

	ASSERT_EQ(0, ftruncate(self->memfd, 4 * HUGE));
	buffer = create(self->memfd, 0, self->size);
	ASSERT_LE(0, buffer);
	for (size_t i = 0; i < sizeof(offsets) / sizeof(*offsets); i++) {
		EXPECT_EQ(NULL, view(buffer, offsets[i], PAGE))
			TH_LOG("offset %#llx", (unsigned long long)offsets[i]);
	}
	close(buffer);
}

TEST_HARNESS_MAIN
