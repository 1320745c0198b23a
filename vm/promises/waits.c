// SPDX-License-Identifier: GPL-2.0
/*
 * Promise: a create waits for no lock that a buffer does not need, and a SIGKILL ends it while it
 * waits for one that it does need. For what cannot come it does not wait at all: memory that has to
 * move, and cannot, because it has failed.
 *
 * Who is affected otherwise: whoever makes buffers of descriptors that others handed over. The lock
 * of a file is held for as long as its file system likes: a FUSE server that does not answer, or a
 * program that holds back the memory it writes from, and the task hangs, beyond the reach of kill.
 * Where it holds a lock itself, others hang with it.
 *
 * How it is looked for: a thread writes to the file from memory that userfaultfd holds back, so
 * that it stays in write(), with the lock, until the case lets it go on.
 *
 * VM: MEM=2048 SMP=2 APPEND="movablecore=1G"
 */

#include <linux/userfaultfd.h>

#include "bad_page.h"

#define PATIENCE_MS 10000

static struct {
	struct books before;
	pthread_t writer;
	char *page;		/* what it writes, held back */
	int uffd, file;
} t;

static void *write_page(void *arg)
{
	return (void *)pwrite(t.file, t.page, PAGE, 0);
}

/* Returns when a thread is in write() to the file. */
static void hold_lock(struct __test_metadata *_metadata, int file)
{
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register area = { .mode = UFFDIO_REGISTER_MODE_MISSING };
	struct uffd_msg fault;

	t.file = file;
	t.page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	ASSERT_NE(MAP_FAILED, (void *)t.page);
	t.uffd = syscall(SYS_userfaultfd, O_CLOEXEC);
	ASSERT_LE(0, t.uffd);
	ASSERT_EQ(0, ioctl(t.uffd, UFFDIO_API, &api));
	area.range = (struct uffdio_range){ .start = (__u64)t.page, .len = PAGE };
	ASSERT_EQ(0, ioctl(t.uffd, UFFDIO_REGISTER, &area));
	ASSERT_EQ(0, pthread_create(&t.writer, NULL, write_page, NULL));
	ASSERT_EQ((ssize_t)sizeof(fault), read(t.uffd, &fault, sizeof(fault)));
	ASSERT_EQ(UFFD_EVENT_PAGEFAULT, fault.event);
}

static void release_lock(struct __test_metadata *_metadata)
{
	struct uffdio_zeropage zero = { .range = { .start = (__u64)t.page, .len = PAGE } };
	void *written;

	EXPECT_EQ(0, ioctl(t.uffd, UFFDIO_ZEROPAGE, &zero));
	EXPECT_EQ(0, pthread_join(t.writer, &written));
	EXPECT_EQ((void *)PAGE, written);
	munmap(t.page, PAGE);
	close(t.uffd);
}

/* A task that ends with the errno of a create: a page of @first, which nobody holds up, and one of @fd. */
static pid_t start_create(int first, int fd)
{
	struct udmabuf_create_item items[] = {
		{ .memfd = first, .size = PAGE }, { .memfd = fd, .size = PAGE },
	};
	pid_t pid = fork();

	if (!pid)
		_exit(-create_list(items, 2));
	return pid;
}

static pid_t start_write(int fd)
{
	pid_t pid = fork();

	if (!pid)
		_exit(pwrite(fd, "", 1, 0) != 1);
	return pid;
}

static bool has_ended(pid_t pid, int *status)
{
	for (int ms = 0; ms < PATIENCE_MS; ms += 10) {
		if (waitpid(pid, status, WNOHANG) == pid)
			return true;
		usleep(10000);
	}
	return false;
}

static char state_of(pid_t pid)
{
	char path[64], state = 0;
	FILE *f;

	snprintf(path, sizeof(path), "/proc/%d/stat", pid);
	f = fopen(path, "re");
	if (!f || fscanf(f, "%*d (%*[^)]) %c", &state) != 1)
		state = 0;
	if (f)
		fclose(f);
	return state;
}

/* Asleep in the kernel for a second on end: any task can be for a moment. */
static bool waits(pid_t pid)
{
	int looks = 0;

	for (int ms = 0; ms < PATIENCE_MS && looks < 100; ms += 10) {
		looks = state_of(pid) == 'D' ? looks + 1 : 0;
		usleep(10000);
	}
	return looks == 100;
}

TEST(locked_file_of_another_kind_is_refused)
{
	char path[] = "/tmp/promise-XXXXXX";
	int fd = mkstemp(path), memfd = new_memfd(&shmem, PAGE), status = 0;
	pid_t pid, other;

	ASSERT_LE(0, fd);
	ASSERT_LE(0, memfd);
	unlink(path);
	hold_lock(_metadata, fd);
	other = start_write(fd);
	EXPECT_TRUE(waits(other)) TH_LOG("the file system holds no lock meanwhile");
	pid = start_create(memfd, fd);
	ASSERT_LT(0, pid);
	EXPECT_TRUE(has_ended(pid, &status)) {
		kill(pid, SIGKILL);
		TH_LOG("it waits, and a SIGKILL does %s", has_ended(pid, &status) ? "help" : "not help");
		release_lock(_metadata);
		waitpid(pid, &status, 0);
		return;
	}
	EXPECT_EQ(EBADFD, WEXITSTATUS(status));
	release_lock(_metadata);
	waitpid(other, &status, 0);
	close(fd);
	close(memfd);
}

TEST(waiting_for_a_locked_memfd_can_be_killed)
{
	int free_one, status = 0;
	pid_t pid;

	t.before = read_books();
	free_one = new_memfd(&shmem, PAGE);
	t.file = new_memfd(&shmem, PAGE);
	ASSERT_LE(0, t.file);
	hold_lock(_metadata, t.file);
	pid = start_create(free_one, t.file);
	ASSERT_LT(0, pid);
	EXPECT_TRUE(waits(pid));
	kill(pid, SIGKILL);
	EXPECT_TRUE(has_ended(pid, &status)) {
		release_lock(_metadata);
		waitpid(pid, &status, 0);
		return;
	}
	EXPECT_TRUE(WIFSIGNALED(status));
	EXPECT_EQ(t.before.pins, pins());
	release_lock(_metadata);
	close(t.file);
	close(free_one);
	EXPECT_SAME_BOOKS(t.before);
}

/* The last case: a kernel that fails it goes on for ever, with a CPU and the lock of the file. */
TEST(memory_that_has_to_move_and_cannot_is_refused)
{
	int memfd, free_one, status = 0;
	__u64 pfn;
	pid_t pid;
	char *mem;

	t.before = read_books();
	free_one = new_memfd(&shmem, PAGE);
	memfd = new_memfd(&shmem, HUGE);
	ASSERT_LE(0, memfd);
	mem = map_fd(memfd, HUGE, PROT_READ | PROT_WRITE);
	ASSERT_NE(NULL, mem);
	fill(mem, 0, HUGE / PAGE, 1000);
	ASSERT_EQ((long)(HUGE / PAGE), pages_in(zone_movable(), mem, HUGE));
	pfn = pfn_of(mem);
	ASSERT_TRUE(inject(mem));
	pid = start_create(free_one, memfd);
	ASSERT_LT(0, pid);
	EXPECT_TRUE(has_ended(pid, &status)) {
		kill(pid, SIGKILL);
		TH_LOG("it goes on, and a SIGKILL does %s", has_ended(pid, &status) ? "help" : "not help");
		return;
	}
	EXPECT_EQ(EIO, WEXITSTATUS(status));
	munmap(mem, HUGE);
	close(memfd);
	close(free_one);
	EXPECT_TRUE(write_number(UNPOISON, pfn));
	EXPECT_SAME_BOOKS(t.before);
}

TEST_HARNESS_MAIN
