/*
 * Between libfuse and the device. This library is loaded with RTLD_GLOBAL before libfuse's other users, so its
 * fuse_session_mount is the one they call: it mounts by libfuse's own, and then has the session read and write through
 * here (fuse_session_custom_io, libfuse 3.13 and later). The descriptor that pyfuse3 waits for stays the device.
 */
#define _GNU_SOURCE
#include "core.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <poll.h>
#include <sched.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

/* Nanoseconds to wait for the next request after one was answered here, before Python's event loop gets its turn: a
 * turn costs more than waking up does. What the loop waits for ends the wait (`gate.loop`), its deadlines do not. */
#define LINGER 2000000
/* The same where it cannot be seen what the loop waits for. */
#define LINGER_BLIND 100000
/* Nanoseconds in which the device is looked at, giving up the processor in between, before that: a client that does nothing but
 * ask has asked again by then. Waking up another processor that sleeps costs as much (12,000 cold stats on an idle machine: 610
 * ms without, 415 with; fuse-overlayfs 780). */
#define LOOKING 40000
/* Answers in a row, while Python has work, before it gets its turn. */
#define TURN 8
/* At most as many when it has none that is known here. */
#define LONG_TURN 512

struct fuse_session;
struct custom_io { /* struct fuse_custom_io of libfuse 3.13 to 3.16; later ones are longer at the end */
	ssize_t (*writev)(int fd, struct iovec *parts, int count, void *data);
	ssize_t (*read)(int fd, void *buffer, size_t size, void *data);
	void *others[4];
};

static struct gate *armed;
/* The library that calls us, in whose dependencies libfuse is. */
static void *caller;

/* The Python side of `hook_receive`: gives the interpreter lock away around it. */
extern ssize_t hook_receive_unlocked(struct gate *gate, int device, void *buffer, size_t size);

bool hook_serve(const char *library)
{
	caller = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
	return caller != NULL;
}

void hook_arm(struct gate *gate)
{
	armed = gate;
}

/* libfuse's own, whatever we define ourselves. */
static void *theirs(const char *name)
{
	return caller ? dlsym(caller, name) : NULL;
}

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

/* -- to libfuse ----------------------------------------------------------------------------------------------------- */

static bool has_reply(uint32_t opcode)
{
	return opcode != FUSE_FORGET && opcode != FUSE_BATCH_FORGET && opcode != FUSE_INTERRUPT;
}

static void note_init(struct gate *gate, const struct fuse_in_header *in, const char *frame, size_t size)
{
	struct fuse_init_in init = {0};
	size_t body = size - sizeof(*in);

	if (size < sizeof(*in))
		return;
	memcpy(&init, frame + sizeof(*in), body < sizeof(init) ? body : sizeof(init));
	gate->init_flags = init.flags;
	if (init.flags & FUSE_INIT_EXT)
		gate->init_flags |= (uint64_t)init.flags2 << 32;
}

ssize_t hook_receive(struct gate *gate, int device, void *buffer, size_t size)
{
	struct pollfd ready[2] = {{.fd = device, .events = POLLIN}, {.fd = gate->loop, .events = POLLIN}};
	const struct timespec linger = {.tv_nsec = gate->loop < 0 ? LINGER_BLIND : LINGER};
	unsigned answered = 0;
	uint64_t last = 0; /* when one was answered */

	for (;;) {
		ssize_t got = read(device, buffer, size);
		struct fuse_in_header in = {0};
		size_t length;

		if (got < 0 && errno == EAGAIN && answered && !gate->asked.used && now_ns() - last < LOOKING) {
			sched_yield();
			continue;
		}
		if (got < 0 && errno == EAGAIN) {
			if (!answered || gate->asked.used || ppoll(ready, 2, &linger, NULL) <= 0 || ready[1].revents)
				return -EINTR;
			continue;
		}
		if (got < 0 && errno == ENOENT)
			continue; /* whoever asked has gone */
		if (got < 0)
			return -errno;
		length = (size_t)got;
		switch (gate_answer(gate, buffer, &length)) {
		case ANSWERED:
			answered++;
			last = now_ns();
			if (answered >= (gate->asked.used ? TURN : LONG_TURN))
				return -EINTR;
			continue;
		case CARRIED:
			gate->carry(buffer, length);
			return -EINTR;
		case PASSED:
			memcpy(&in, buffer, length < sizeof(in) ? length : sizeof(in));
			if (in.opcode == FUSE_INIT)
				note_init(gate, &in, buffer, length);
			if (has_reply(in.opcode))
				map_put(&gate->asked, in.unique, (void *)(uintptr_t)in.opcode);
			return (ssize_t)length;
		}
	}
}

void hook_replied(struct gate *gate)
{
	gate->replied = now_ns();
}

void hook_look(const struct gate *gate)
{
	struct pollfd loop = {.fd = gate->loop, .events = POLLIN};

	if (gate->loop < 0)
		return;
	while (now_ns() - gate->replied < LOOKING && poll(&loop, 1, 0) == 0)
		sched_yield();
}

static ssize_t receive(int device, void *buffer, size_t size, void *data)
{
	ssize_t got = hook_receive_unlocked(armed, device, buffer, size);

	(void)data;
	if (got >= 0)
		return got;
	errno = (int)-got;
	return -1;
}

/* -- from libfuse --------------------------------------------------------------------------------------------------- */

static void change_init(const struct gate *gate, struct fuse_init_out *init)
{
	uint64_t flags = gate->extra_init_flags & gate->init_flags;

	init->flags |= (uint32_t)flags;
	/* Nobody would see the O_TRUNC of an open that is not asked for: a SETATTR comes instead. */
	if (gate->openless)
		init->flags &= ~(uint32_t)FUSE_ATOMIC_O_TRUNC;
	if (flags >> 32) {
		init->flags |= FUSE_INIT_EXT;
		init->flags2 |= (uint32_t)(flags >> 32);
	}
	if (flags & INIT_PASSTHROUGH)
		backing_init(gate, init);
}

/* The end of a reply to OPEN or CREATE, as the kernel is to get it; false: as it is. */
static bool change_opened(const struct gate *gate, const struct iovec *payload, struct fuse_open_out *opened)
{
	void *id;

	if (!gate->backed.used || payload->iov_len < sizeof(*opened))
		return false;
	memcpy(opened, (char *)payload->iov_base + payload->iov_len - sizeof(*opened), sizeof(*opened));
	id = map_get(&gate->backed, opened->fh);
	if (id)
		backing_tell(opened, (int32_t)(uintptr_t)id);
	return id != NULL;
}

static ssize_t send_off(int device, struct iovec *parts, int count)
{
	ssize_t sent = writev(device, parts, count);

	hook_replied(armed);
	return sent;
}

/* gate/PROTOCOL.md has the table of what is rewritten. */
static ssize_t send_reply(int device, struct iovec *parts, int count, void *data)
{
	struct fuse_out_header header;
	struct iovec changed[3];
	struct fuse_open_out opened;
	struct fuse_init_out init;
	uint32_t opcode = 0;

	(void)data;
	if (count >= 1 && parts[0].iov_len == sizeof(header)) {
		memcpy(&header, parts[0].iov_base, sizeof(header));
		if (header.unique) /* notifications have none */
			opcode = (uint32_t)(uintptr_t)map_take(&armed->asked, header.unique);
	}
	if (count != 2 || header.error || !opcode)
		return send_off(device, parts, count);
	changed[0] = parts[0];
	changed[1] = parts[1];
	if (opcode == FUSE_INIT && parts[1].iov_len >= sizeof(init)) {
		memcpy(&init, parts[1].iov_base, sizeof(init));
		change_init(armed, &init);
		changed[1].iov_base = &init;
		/* Whatever a later libfuse has behind it stays. */
		changed[1].iov_len = sizeof(init);
		changed[2].iov_base = (char *)parts[1].iov_base + sizeof(init);
		changed[2].iov_len = parts[1].iov_len - sizeof(init);
		count = changed[2].iov_len ? 3 : 2;
	} else if (opcode == FUSE_OPENDIR && parts[1].iov_len == sizeof(opened)) {
		memcpy(&opened, parts[1].iov_base, sizeof(opened));
		opened.open_flags |= gate_listing_flags(armed, opened.fh);
		changed[1].iov_base = &opened;
	} else if ((opcode == FUSE_OPEN || opcode == FUSE_CREATE) && change_opened(armed, &parts[1], &opened)) {
		changed[1].iov_len -= sizeof(opened);
		changed[2] = (struct iovec){&opened, sizeof(opened)};
		count = 3;
	}
	return send_off(device, changed, count);
}

static int take_over(struct fuse_session *session)
{
	const struct custom_io io = {.writev = send_reply, .read = receive};
	int (*descriptor)(struct fuse_session *) =
		(int (*)(struct fuse_session *))theirs("fuse_session_fd");
	int (*newer)(struct fuse_session *, const struct custom_io *, size_t, int) =
		(int (*)(struct fuse_session *, const struct custom_io *, size_t, int))theirs(
			"fuse_session_custom_io_317");
	int (*older)(struct fuse_session *, const struct custom_io *, int) =
		(int (*)(struct fuse_session *, const struct custom_io *, int))theirs("fuse_session_custom_io");
	int device, status;

	if (!descriptor || !(newer || older))
		return -1;
	device = descriptor(session);
	armed->device = fcntl(device, F_DUPFD_CLOEXEC, 3);
	if (armed->device < 0 || fcntl(device, F_SETFL, O_RDWR | O_NONBLOCK))
		return -1;
	status = newer ? newer(session, &io, 4 * sizeof(void *), device) : older(session, &io, device);
	armed->hooked = !status;
	return status;
}

__attribute__((visibility("default"))) int fuse_session_mount(struct fuse_session *session, const char *mountpoint)
{
	int (*mount)(struct fuse_session *, const char *) =
		(int (*)(struct fuse_session *, const char *))theirs("fuse_session_mount");
	int status = mount ? mount(session, mountpoint) : -1;

	/* Where that fails the mount is good without a gate; whoever armed it sees `hooked`. */
	if (!status && armed)
		take_over(session);
	return status;
}
