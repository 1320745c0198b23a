// SPDX-License-Identifier: GPL-2.0
/*
 * Promise: those who may open /dev/udmabuf, without other privileges, can pin half of the memory with all
 * their buffers together, and no more. The one that is too much is refused with ENOMEM, and the kernel's
 * log says why. Once buffers are gone, there can be others.
 *
 * Who is affected otherwise: everybody else on the machine. What is pinned is not swapped out, and the
 * OOM killer does not see it in the task that holds the buffer.
 *
 * How it is looked for: a task without privileges makes buffers of PART, until one is refused or it has
 * three quarters of the memory.
 *
 * VM: MEM=1024 SMP=2
 */

#include "promise.h"

#define PART (16 * MIB)
#define ENOUGH 64		/* buffers */

static struct {
	struct books before;
	long memory;		/* bytes */
} t;

FIXTURE(most) {
};

FIXTURE_SETUP(most)
{
	t.before = read_books();
	t.memory = value_of("/proc/meminfo", "MemTotal") * (long)KIB;
}

FIXTURE_TEARDOWN(most)
{
	EXPECT_SAME_BOOKS(t.before);
}

/* Makes buffers, and returns how much they have in all; in @err the errno that ended it, or 0. */
static long pin_all_there_is(int *fds, int *err)
{
	long size = 0;

	*err = 0;
	for (int i = 0; i < ENOUGH && size < t.memory / 4 * 3; i++) {
		int memfd = new_memfd(&shmem, PART);

		fds[i] = create(memfd, 0, PART);
		close(memfd);
		if (fds[i] < 0) {
			*err = -fds[i];
			break;
		}
		size += PART;
	}
	return size;
}

/* What is wrong, as bits; 0: nothing. */
static int without_privileges(void)
{
	int fds[ENOUGH], err, wrong = 0;
	long size;

	if (setresgid(65534, 65534, 65534) || setresuid(65534, 65534, 65534))
		return 64;
	size = pin_all_there_is(fds, &err);
	wrong |= size > t.memory * 53 / 100;	/* of what is there once the kernel has booted */
	wrong |= (size < t.memory * 45 / 100) << 1;
	wrong |= (err != ENOMEM) << 2;
	printf("# %ld of %ld MiB, then errno %d\n", size / (long)MIB, t.memory / (long)MIB, err);
	if (!size)
		return wrong;
	close(fds[0]);
	fds[0] = create(new_memfd(&shmem, PART), 0, PART);
	wrong |= (fds[0] < 0) << 3;
	return wrong;
}

TEST_F(most, half_of_the_memory)
{
	pid_t pid;
	int status;

	ASSERT_EQ(0, chmod("/dev/udmabuf", 0666));
	fflush(stdout);
	pid = fork();
	ASSERT_LE(0, pid);
	if (!pid) {
		int wrong = without_privileges();

		fflush(stdout);
		_exit(wrong);
	}
	ASSERT_EQ(pid, waitpid(pid, &status, 0));
	EXPECT_EQ(0, status);
}

/* Who is privileged can have more, and what he has counts for the others. */
TEST_F(most, more_with_CAP_IPC_LOCK)
{
	int fds[ENOUGH], err;
	long size = pin_all_there_is(fds, &err);
	pid_t pid;
	int status;

	EXPECT_EQ(0, err);
	EXPECT_LE(t.memory / 4 * 3, size);
	pid = fork();
	ASSERT_LE(0, pid);
	if (!pid) {
		if (setresuid(65534, 65534, 65534))
			_exit(64);
		_exit(create(new_memfd(&shmem, PAGE), 0, PAGE) != -ENOMEM);
	}
	ASSERT_EQ(pid, waitpid(pid, &status, 0));
	EXPECT_EQ(0, status);
	for (long i = 0; i < size / (long)PART; i++)
		close(fds[i]);
}

TEST_HARNESS_MAIN
