/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Drivers that import a dma-buf, for the programs that need one. Both are in the kernel and need
 * no hardware:
 *
 * vgem attaches to the buffer, has it mapped for its device, and gives a mapping of it through its
 *	own descriptor, which goes through dma_buf_mmap().
 * vkms does that too, and shows the buffer on a screen: it maps it into the kernel, by
 *	dma_buf_vmap(), and tells the CRC of the pixels that it read.
 */
#ifndef PROMISE_DRM_H
#define PROMISE_DRM_H

#include <drm/drm.h>
#include <drm/drm_fourcc.h>
#include <drm/drm_mode.h>
#include <poll.h>

#include "promise.h"

#define CARDS 16

/* The first descriptor of @driver's primary node is its master. -1: there is no such driver. */
static inline int drm_open(const char *driver, int *card)
{
	for (int i = 0; i < CARDS; i++) {
		char path[32], name[16] = "";
		struct drm_version version = { .name = name, .name_len = sizeof(name) - 1 };
		int fd;

		snprintf(path, sizeof(path), "/dev/dri/card%d", i);
		fd = open(path, O_RDWR | O_CLOEXEC);
		if (fd < 0)
			continue;
		if (!ioctl(fd, DRM_IOCTL_VERSION, &version) && !strcmp(name, driver)) {
			if (card)
				*card = i;
			return fd;
		}
		close(fd);
	}
	return -1;
}

/* Returns a handle, which is never 0, or a negative errno. */
static inline long drm_import(int drm, int buffer)
{
	struct drm_prime_handle arg = { .fd = buffer };

	return ioctl(drm, DRM_IOCTL_PRIME_FD_TO_HANDLE, &arg) ? -errno : (long)arg.handle;
}

static inline int drm_export(int drm, __u32 handle)
{
	struct drm_prime_handle arg = { .handle = handle, .flags = DRM_CLOEXEC | DRM_RDWR };

	return ioctl(drm, DRM_IOCTL_PRIME_HANDLE_TO_FD, &arg) ? -errno : arg.fd;
}

static inline int drm_close_handle(int drm, __u32 handle)
{
	struct drm_gem_close arg = { .handle = handle };

	return ioctl(drm, DRM_IOCTL_GEM_CLOSE, &arg) ? -errno : 0;
}

/* What would tell where in a drm descriptor an object is; not that of an imported one. */
static inline int drm_offset_of(int drm, __u32 handle, __u64 *offset)
{
	struct drm_mode_map_dumb arg = { .handle = handle };
	int ret = ioctl(drm, DRM_IOCTL_MODE_MAP_DUMB, &arg) ? -errno : 0;

	*offset = arg.offset;
	return ret;
}

/*
 * Where in a drm descriptor the next object of @size will be: where one is that goes away right
 * after. That of an imported object must be guessed, because the ioctl which tells it refuses
 * these, but mmap() of the descriptor takes it. 0: that did not work.
 */
static inline __u64 drm_next_offset(int drm, size_t size)
{
	struct drm_mode_create_dumb dumb = {
		.width = PAGE / 4, .height = size / PAGE, .bpp = 32,
	};
	__u64 offset = 0;

	if (ioctl(drm, DRM_IOCTL_MODE_CREATE_DUMB, &dumb))
		return 0;
	if (drm_offset_of(drm, dumb.handle, &offset))
		offset = 0;
	drm_close_handle(drm, dumb.handle);
	return offset;
}

/* Maps at a multiple of 2 MiB what a drm descriptor has at @offset. NULL, and errno: it cannot. */
static inline char *drm_map(int drm, __u64 offset, size_t size, int prot)
{
	char *at = mmap(NULL, size + HUGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
			-1, 0);
	char *map;

	if (at == MAP_FAILED)
		return NULL;
	munmap(at, size + HUGE);
	at = (char *)(((uintptr_t)at + HUGE - 1) & ~(HUGE - 1));
	map = mmap(at, size, prot, MAP_SHARED | MAP_FIXED, drm, offset);
	return map == MAP_FAILED ? NULL : map;
}

/* May a buffer of hugetlb be mapped, by itself or by an importer? Nothing is touched here. */
static inline bool maps_frames(int buffer)
{
	char *map = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, buffer, 0);
	bool frames = map != MAP_FAILED && maps_page_frames(map);

	if (map != MAP_FAILED)
		munmap(map, PAGE);
	return frames;
}

/* A screen of vkms: a line of it is the beginning of a page of the buffer, and has 64 pixels. */
#define LINE_PIXELS 64
#define MIN_LINES 20
#define MAX_LINES 8192

struct screen {
	int drm;
	int card;
	__u32 crtc, connector;
};

/*
 * From here on, the task stays on one CPU, which then runs the timer of vkms, too. On 6.1 and 6.12, a
 * screen goes off with locks held that the timer takes: where another CPU runs it, both wait for ever.
 */
static inline bool screen_open(struct screen *screen)
{
	__u32 crtcs[8], connectors[8];
	struct drm_mode_card_res res = {
		.crtc_id_ptr = (uintptr_t)crtcs, .count_crtcs = ARRAY_SIZE(crtcs),
		.connector_id_ptr = (uintptr_t)connectors, .count_connectors = ARRAY_SIZE(connectors),
	};
	cpu_set_t here;

	screen->drm = drm_open("vkms", &screen->card);
	if (screen->drm < 0)
		return false;
	CPU_ZERO(&here);
	CPU_SET(0, &here);
	sched_setaffinity(0, sizeof(here), &here);
	if (ioctl(screen->drm, DRM_IOCTL_MODE_GETRESOURCES, &res) || !res.count_crtcs ||
	    !res.count_connectors) {
		close(screen->drm);
		return false;
	}
	screen->crtc = crtcs[0];
	screen->connector = connectors[0];
	return true;
}

/* Returns a framebuffer of an imported buffer, which is never 0, or a negative errno. */
static inline long screen_add(const struct screen *screen, __u32 handle, unsigned int lines)
{
	struct drm_mode_fb_cmd2 arg = {
		.width = LINE_PIXELS, .height = lines, .pixel_format = DRM_FORMAT_XRGB8888,
		.handles = { handle }, .pitches = { PAGE },
	};

	return ioctl(screen->drm, DRM_IOCTL_MODE_ADDFB2, &arg) ? -errno : (long)arg.fb_id;
}

static inline int screen_remove(const struct screen *screen, __u32 fb)
{
	return ioctl(screen->drm, DRM_IOCTL_MODE_RMFB, &fb) ? -errno : 0;
}

/* The buffer is mapped into the kernel from here to screen_off(), or until @fb is removed. */
static inline int screen_on(const struct screen *screen, __u32 fb, unsigned int lines)
{
	__u32 connector = screen->connector;
	struct drm_mode_crtc arg = {
		.crtc_id = screen->crtc, .fb_id = fb,
		.set_connectors_ptr = (uintptr_t)&connector, .count_connectors = 1,
		.mode_valid = 1,
		.mode = {
			.hdisplay = LINE_PIXELS, .hsync_start = LINE_PIXELS + 8,
			.hsync_end = LINE_PIXELS + 16, .htotal = LINE_PIXELS + 36,
			.vdisplay = lines, .vsync_start = lines + 2,
			.vsync_end = lines + 4, .vtotal = lines + 10,
			.name = "promise",
		},
	};

	/* 50 frames a second. */
	arg.mode.clock = arg.mode.htotal * arg.mode.vtotal / 20;
	arg.mode.vrefresh = 50;
	return ioctl(screen->drm, DRM_IOCTL_MODE_SETCRTC, &arg) ? -errno : 0;
}

static inline int screen_off(const struct screen *screen)
{
	struct drm_mode_crtc arg = { .crtc_id = screen->crtc };

	return ioctl(screen->drm, DRM_IOCTL_MODE_SETCRTC, &arg) ? -errno : 0;
}

/*
 * Does the kernel read, of the pixels, what has this CRC? A frame that is slow to compose may have
 * been begun before they were written: one of the next is good enough.
 */
static inline bool screen_shows(const struct screen *screen, unsigned int wanted)
{
	struct pollfd data = { .events = POLLIN };
	char path[64], line[64] = "";
	unsigned int crc;
	bool found = false;

	snprintf(path, sizeof(path), "/sys/kernel/debug/dri/%d/crtc-0/crc/data", screen->card);
	data.fd = open(path, O_RDONLY | O_CLOEXEC);
	if (data.fd < 0)
		return false;
	for (int frame = 0; !found && frame < 50; frame++)
		if (poll(&data, 1, 60000) == 1 && read(data.fd, line, sizeof(line) - 1) > 0)
			found = sscanf(line, "%*x %x", &crc) == 1 && crc == wanted;
	close(data.fd);
	return found;
}

/* The CRC that it should be, of what is mapped at @at: of four 16-bit channels of each pixel. */
static inline unsigned int crc_of(const char *at, unsigned int lines)
{
	static __u32 table[256];
	__u32 crc = 0;

	for (__u32 i = 0; !table[255] && i < 256; i++) {
		__u32 value = i;

		for (int bit = 0; bit < 8; bit++)
			value = value >> 1 ^ (value & 1 ? 0xedb88320 : 0);
		table[i] = value;
	}
	for (unsigned int y = 0; y < lines; y++) {
		for (unsigned int x = 0; x < LINE_PIXELS; x++) {
			const unsigned char *p = (const unsigned char *)at + y * PAGE + x * 4;
			const unsigned char channels[4] = { 0xff, p[2], p[1], p[0] };

			/* v * 257 is v twice, side by side. */
			for (int i = 0; i < 8; i++)
				crc = crc >> 8 ^ table[(crc ^ channels[i / 2]) & 0xff];
		}
	}
	return crc;
}

#endif
