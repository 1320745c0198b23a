/* SPDX-License-Identifier: GPL-2.0 */
/* A page whose memory is said to have failed. */
#ifndef BAD_PAGE_H
#define BAD_PAGE_H

#include "promise.h"

#include <setjmp.h>

/* Takes the page frame that is to be used again. */
#define UNPOISON "/sys/kernel/debug/hwpoison/unpoison-pfn"

static sigjmp_buf on_sigbus;

static void catch_sigbus(int sig)
{
	siglongjmp(on_sigbus, 1);
}

/*
 * Newer kernels have the task that injects the failure die of it, where they cannot get rid of the
 * page. EBUSY: this one could not either, since a buffer has it.
 */
static bool inject(char *at)
{
	struct sigaction action = { .sa_handler = catch_sigbus };
	bool injected = true;

	sigaction(SIGBUS, &action, NULL);
	if (!sigsetjmp(on_sigbus, 1))
		injected = !madvise(at, PAGE, MADV_HWPOISON) || errno == EBUSY;
	signal(SIGBUS, SIG_DFL);
	return injected;
}

#endif
