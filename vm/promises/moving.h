/* SPDX-License-Identifier: GPL-2.0 */
/*
 * For the programs about memory that must move before it is pinned: counts page frames, and has a
 * thread use a buffer while they move.
 */
#ifndef MOVING_H
#define MOVING_H

#include "promise.h"

/* How many of @n pages are in @range. */
static inline long pfns_in(struct pfn_range range, const __u64 *pfns, size_t n)
{
	long in = 0;

	for (size_t i = 0; i < n; i++)
		in += pfns[i] >= range.start && pfns[i] < range.end;
	return in;
}

/* One who uses the buffer and the memfd, without a pause */

static struct {
	pthread_t thread;
	char *map, *mem;		/* the same memory */
	size_t first, n;		/* its pages */
	unsigned int who;		/* wrote what is there now */
	_Atomic long rounds, bad;
	atomic_bool stop;
} user __attribute__((unused));

static inline void *use(void *arg)
{
	(void)arg;
	while (!user.stop) {
		fill(user.map, user.first, user.n, user.who + 1);
		user.bad += wrong(user.mem, user.first, user.n, user.who + 1);
		fill(user.mem, user.first, user.n, user.who + 2);
		user.bad += wrong(user.map, user.first, user.n, user.who + 2);
		user.who += 2;
		user.rounds++;
		usleep(1000);
	}
	return NULL;
}

/* Waits for a round that begins from now on to have ended. */
static inline void wait_for_round(void)
{
	long rounds = user.rounds + 2;

	while (user.rounds < rounds)
		usleep(1000);
}

static inline void start_user(struct __test_metadata *_metadata, char *map, char *mem, size_t first,
		       size_t n, unsigned int who)
{
	user.map = map;
	user.mem = mem;
	user.first = first;
	user.n = n;
	user.who = who;
	ASSERT_EQ(0, pthread_create(&user.thread, NULL, use, NULL));
	wait_for_round();
}

static inline void stop_user(struct __test_metadata *_metadata)
{
	wait_for_round();
	user.stop = true;
	pthread_join(user.thread, NULL);
	EXPECT_EQ(0, user.bad);
}

#endif
