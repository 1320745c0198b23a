/* SPDX-License-Identifier: GPL-2.0 */
/* For the programs that count, or wait for, what the kernel traces: in an instance of their own. */
#ifndef TRACE_H
#define TRACE_H

#include <sys/mount.h>

#include "promise.h"

#define TRACING "/sys/kernel/tracing/"
#define TRACE TRACING "instances/promise/"

/* Does the kernel have @event, "SYSTEM/NAME"? */
static inline bool has_event(const char *event)
{
	char path[128];

	if (access(TRACING "events", F_OK))
		mount("none", TRACING, "tracefs", 0, NULL);
	snprintf(path, sizeof(path), TRACING "events/%s", event);
	return !access(path, F_OK);
}

/*
 * Is @event traced, too, from now on? Of one thread, or with @pid 0 of all. Not by set_event_pid: with
 * it, the kernel patches its scheduler while another CPU runs that. QEMU 7.2 then now and then executes
 * an int3 that is no longer there, and the kernel dies.
 */
static inline bool also_trace(const char *event, pid_t pid)
{
	char path[128], filter[32];

	snprintf(path, sizeof(path), TRACE "events/%s/filter", event);
	snprintf(filter, sizeof(filter), "common_pid == %d", pid);
	if (pid && !write_file(path, filter))
		return false;
	snprintf(path, sizeof(path), TRACE "events/%s/enable", event);
	return write_file(path, "1");
}

/* The same, and nothing else is. */
static inline bool start_trace(const char *event, pid_t pid)
{
	if (!has_event(event))
		return false;
	/* There, if another case has failed. */
	rmdir(TRACE);
	return !mkdir(TRACE, 0700) && also_trace(event, pid);
}

static inline void end_trace(void)
{
	rmdir(TRACE);
}

/*
 * How many lines of the trace have @text; in @sum, unless it is NULL, the sum of the numbers that
 * follow it. What was traced is forgotten then.
 */
static inline long traced(const char *text, long *sum)
{
	FILE *f = fopen(TRACE "trace", "re");
	char line[512], *at;
	long n = 0;

	if (sum)
		*sum = 0;
	while (f && fgets(line, sizeof(line), f)) {
		at = strstr(line, text);
		n += !!at;
		if (at && sum)
			*sum += strtol(at + strlen(text), NULL, 10);
	}
	if (f)
		fclose(f);
	close(open(TRACE "trace", O_WRONLY | O_TRUNC));
	return n;
}

/* What tells of an attempt to migrate memory that is to be pinned. */
#define ATTEMPT_EVENT "migrate/mm_migrate_pages"
#define ATTEMPT "reason=longterm_pin"

#endif
