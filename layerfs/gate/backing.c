/*
 * Files that the kernel reads and writes itself (passthrough, Linux 6.9). It takes all handles of a node that are open at a
 * time one way: through one backing file, or through its own pages; else the open fails (fs/fuse/iomode.c). So the first
 * handle decides, and a RELEASE ends it for all: it comes when the kernel has let go, never before.
 */
#define _GNU_SOURCE
#include "core.h"

#include <errno.h>
#include <linux/capability.h>
#include <linux/fuse.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Not in the headers of older distributions. */
struct backing_map {
	int32_t fd;
	uint32_t flags;
	uint64_t padding;
};
#define BACKING_OPEN _IOW(229, 1, struct backing_map)
#define BACKING_CLOSE _IOW(229, 2, uint32_t)
#define OPEN_PASSTHROUGH (1u << 7)
/* fuse_open_out.backing_id and fuse_init_out.max_stack_depth, once padding. */
#define BACKING_ID (offsetof(struct fuse_open_out, open_flags) + sizeof(uint32_t))
#define STACK_DEPTH (offsetof(struct fuse_init_out, flags2) + sizeof(uint32_t))

static int32_t register_file(const struct gate *gate, int fd)
{
	struct backing_map map = {.fd = fd};

	return gate->control(gate->device, BACKING_OPEN, &map);
}

/*
 * The kernel writes with the credentials that this thread has now. Without CAP_FSETID in them the file system takes setuid
 * from a file that is written to: HANDLE_KILLPRIV_V2 has left that to us, and we do not see the write.
 */
static int32_t register_to_write(const struct gate *gate, int fd)
{
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct whole[_LINUX_CAPABILITY_U32S_3], less[_LINUX_CAPABILITY_U32S_3];
	int32_t id;

	if (syscall(SYS_capget, &header, whole))
		return -1;
	memcpy(less, whole, sizeof(less));
	less[0].effective &= ~(1u << CAP_FSETID);
	if (syscall(SYS_capset, &header, less))
		return -1;
	id = register_file(gate, fd);
	syscall(SYS_capset, &header, whole);
	return id;
}

int32_t backing_open(struct gate *gate, uint64_t node, int fd, bool allowed)
{
	struct way *way = map_get(&gate->ways, node);
	int32_t id = 0;

	if (way) {
		way->handles++;
		return way->backing;
	}
	way = malloc(sizeof(*way));
	if (!way || !map_put(&gate->ways, node, way)) {
		free(way);
		return -1;
	}
	if (allowed)
		id = gate->passes_lowers ? register_file(gate, fd) : register_to_write(gate, fd);
	*way = (struct way){id > 0 ? id : 0, 1};
	return way->backing;
}

void backing_close(struct gate *gate, uint64_t node)
{
	struct way *way = map_get(&gate->ways, node);
	uint32_t id;

	if (!way || --way->handles)
		return;
	map_take(&gate->ways, node);
	id = (uint32_t)way->backing;
	if (id)
		gate->control(gate->device, BACKING_CLOSE, &id);
	free(way);
}

void backing_free(struct gate *gate)
{
	for (size_t at = 0; gate->ways.slots && at <= gate->ways.mask; at++)
		free(gate->ways.slots[at].value);
	map_free(&gate->ways);
	map_free(&gate->backed);
}

void backing_tell(struct fuse_open_out *opened, int32_t id)
{
	/* The kernel takes no other flag beside it. */
	opened->open_flags = OPEN_PASSTHROUGH;
	memcpy((char *)opened + BACKING_ID, &id, sizeof(id));
}

void backing_init(const struct gate *gate, struct fuse_init_out *init)
{
	memcpy((char *)init + STACK_DEPTH, &gate->stack_depth, sizeof(gate->stack_depth));
}
