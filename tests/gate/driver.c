/*
 * The gate's core without Python: commands in, what it did out. `driver.py` is the other side.
 *
 * Both ways: a length (u32) and that many bytes, all numbers little-endian and unaligned. A command is a letter and its
 * operands; a string is a length (u16) and its bytes. What each answers with stands at its `case`.
 *
 * The device is one end of a SOCK_SEQPACKET socketpair: each reply is one packet.
 */
#define _GNU_SOURCE
#include "hook.c"

#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <malloc.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define FRAME_MAX (1 << 20)
/* Half a million names to publish. */
#define COMMAND_MAX (32 << 20)
/* Milliseconds that a worker may take. */
#define PATIENCE 10000

static struct gate gate;
static int kernel = -1, unplugged = -1;
static int layers[64], layer_count;

/* -- what came in, what goes out ------------------------------------------------------------------------------------ */

static uint8_t in[COMMAND_MAX], out[4 * FRAME_MAX];
static size_t in_size, in_at, out_size;

static void fail(const char *why)
{
	fprintf(stderr, "driver: %s\n", why);
	exit(2);
}

static const void *take(size_t size)
{
	if (in_size - in_at < size)
		fail("a command is too short");
	in_at += size;
	return in + in_at - size;
}

static uint64_t number(size_t size)
{
	uint64_t value = 0;

	memcpy(&value, take(size), size);
	return value;
}

/* Its length goes to `*length`. */
static const char *string(size_t *length)
{
	*length = number(2);
	return take(*length);
}

static void put(const void *data, size_t size)
{
	if (sizeof(out) - out_size < size)
		fail("an answer is too long");
	if (size)
		memcpy(out + out_size, data, size);
	out_size += size;
}

static void put_number(uint64_t value, size_t size)
{
	put(&value, size);
}

/* A copy with the end that system calls want. */
static char *path_operand(void)
{
	size_t length;
	const char *text = string(&length);
	char *copy = malloc(length + 1);

	memcpy(copy, text, length);
	copy[length] = '\0';
	return copy;
}

/* -- what the core calls -------------------------------------------------------------------------------------------- */

static uint64_t let_go[1024];
static size_t let_go_count;

static void on_let_go(uint64_t id)
{
	if (let_go_count < sizeof(let_go) / sizeof(*let_go))
		let_go[let_go_count++] = id;
}

/* Directories that were opened by a call; a handle is given out once. */
#define DIRECTORY_HANDLES 0x1000
static uint8_t open_directories[1 << 16];
static uint32_t directory_handles;

static uint64_t on_open_directory(uint64_t id)
{
	if (!facts_directory(&gate.facts, id))
		return 0;
	if (directory_handles + 1 == sizeof(open_directories))
		fail("too many directories");
	open_directories[++directory_handles] = 1;
	return DIRECTORY_HANDLES + directory_handles;
}

static void on_release_directory(uint64_t handle)
{
	if (handle > DIRECTORY_HANDLES && handle <= DIRECTORY_HANDLES + directory_handles)
		open_directories[handle - DIRECTORY_HANDLES] = 0;
}

/* Backing files; an id is given out once. */
static uint8_t live_backings[1 << 16];
static uint32_t backings, backing_count;

static int control(int device, unsigned long request, ...)
{
	va_list arguments;
	uint32_t id;
	void *argument;

	va_start(arguments, request);
	argument = va_arg(arguments, void *);
	va_end(arguments);
	if (device != gate.device)
		fail("ioctl of something else");
	if (request == 0x4010E501) {
		if (backings + 1 == sizeof(live_backings))
			fail("too many backing files");
		live_backings[++backings] = 1;
		backing_count++;
		return (int)backings;
	}
	memcpy(&id, argument, sizeof(id));
	if (request != 0x4004E502 || id > backings || !live_backings[id])
		fail("a backing file that is none");
	live_backings[id] = 0;
	backing_count--;
	return 0;
}

/* -- commands ------------------------------------------------------------------------------------------------------- */

static void start(void)
{
	uint32_t descriptors = (uint32_t)number(4);
	uint64_t resolve = number(8);
	int pair[2], size = 4 << 20;

	if (!gate_init(&gate, descriptors, resolve) ||
	    socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair))
		fail("no gate");
	/* As root a listing of 256 KiB fits; others ask for less. */
	setsockopt(pair[0], SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof(size));
	gate.device = pair[0];
	kernel = pair[1];
	gate.let_go = on_let_go;
	gate.keeps_listings = true;
	gate.control = control;
	gate.xattrs = number(1);
	gate.carries = number(1);
	if (number(1)) {
		char *path = path_operand();

		gate.statfs = open(path, O_PATH | O_CLOEXEC);
		free(path);
	}
}

static void publish(void)
{
	uint64_t id = number(8);
	uint32_t homes = (uint32_t)number(2), names = (uint32_t)number(4);
	struct directory *directory = facts_prepare(&gate.facts, id, names, homes);

	if (!directory)
		fail("no memory");
	for (uint32_t at = 0; at < homes; at++) {
		int root = layers[number(1)];
		uint64_t base = number(8);
		size_t length;
		const char *path = string(&length);

		facts_home(directory, root, path, length, base);
	}
	for (uint32_t at = 0; at < names; at++) {
		uint8_t kind = (uint8_t)number(1);
		uint16_t home = (uint16_t)number(2);
		uint64_t real = number(8);
		size_t length;
		const char *name = string(&length);

		facts_name(&gate.facts, directory, name, length, kind, home, real);
	}
	put_number(facts_publish(&gate.facts, directory), 1);
}

/* The position that a name operand has in `directory`, or -1. */
static int64_t position_in(struct directory *directory)
{
	size_t length;
	const char *name = string(&length);

	return directory ? facts_find(&gate.facts, directory, name, length) : -1;
}

static void list(void)
{
	uint64_t handle = number(8), id = number(8), parent = number(8);
	uint32_t count = (uint32_t)number(4);
	uint32_t *order = malloc((count + 1) * sizeof(*order));
	struct directory *directory = facts_directory(&gate.facts, id);

	for (uint32_t at = 0; at < count; at++) {
		int64_t position = position_in(directory);

		if (position < 0)
			fail("a listed name that is none");
		order[at] = (uint32_t)position;
	}
	if (!gate_list(&gate, handle, id, parent, order, count, !map_has(&gate.listings, handle)))
		fail("no memory");
}

static void frame(void)
{
	bool waited_for = number(1);
	size_t length = in_size - in_at, size = length;
	uint8_t *copy = malloc(length ? length : 1); /* of its own, so that every byte beyond it is poisoned */
	struct pollfd ready = {.fd = kernel, .events = POLLIN};
	static uint8_t reply[FRAME_MAX];
	enum verdict verdict;
	size_t replies_at;
	uint32_t replies = 0;

	memcpy(copy, take(length), length);
	let_go_count = 0;
	verdict = gate_answer(&gate, copy, &size);
	put_number(verdict, 1);
	put_number(size, 4);
	put(copy, size);
	free(copy);
	replies_at = out_size;
	put_number(0, 4);
	for (;;) {
		ssize_t got;

		/* Workers answer later. */
		if (poll(&ready, 1, waited_for && verdict == ANSWERED && !replies ? PATIENCE : 0) <= 0)
			break;
		got = recv(kernel, reply, sizeof(reply), MSG_DONTWAIT);
		if (got <= 0)
			break;
		put_number((uint64_t)got, 4);
		put(reply, (size_t)got);
		replies++;
	}
	memcpy(out + replies_at, &replies, 4);
	put_number(let_go_count, 4);
	put(let_go, let_go_count * sizeof(*let_go));
}

/* As the hook has no Python here. */
ssize_t hook_receive_unlocked(struct gate *which, int device, void *buffer, size_t size)
{
	return hook_receive(which, device, buffer, size);
}

static void libfuse_replies(void)
{
	struct fuse_out_header header = {.unique = 7};
	uint32_t opcode = (uint32_t)number(4);
	size_t length = in_size - in_at;
	uint8_t *payload = malloc(length ? length : 1);
	struct iovec parts[2] = {{&header, sizeof(header)}, {payload, length}};
	static uint8_t packet[FRAME_MAX];
	ssize_t got;

	memcpy(payload, take(length), length);
	header.len = (uint32_t)(sizeof(header) + length);
	map_put(&gate.asked, header.unique, (void *)(uintptr_t)opcode);
	hook_arm(&gate);
	if (send_reply(gate.device, parts, 2, NULL) < 0 || (got = recv(kernel, packet, sizeof(packet), 0)) < 0)
		fail("no reply");
	put(packet, (size_t)got);
	free(payload);
}

/* Descriptors that the gate may use, by handle; + 1. */
static struct map lending;

static void end_lending(uint64_t handle)
{
	uintptr_t lent = (uintptr_t)map_take(&lending, handle);

	if (lent)
		close((int)lent - 1);
}

static void command(void)
{
	uint8_t letter = (uint8_t)number(1);
	struct directory *directory;
	struct known *known;
	struct told *told;
	int64_t position;
	uint64_t id;
	char *path;
	int fd;

	switch (letter) {
	case 'I': /* descriptors u32, resolve u64, xattrs u8, carries u8, statfs u8 [path]: begin; first of all */
		start();
		break;
	case 'L': /* path: the next layer's root */
		path = path_operand();
		fd = open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
		free(path);
		if (fd < 0 || layer_count == sizeof(layers) / sizeof(*layers))
			fail("no such layer");
		layers[layer_count++] = fd;
		break;
	case 'P': /* id, homes u16, names u32, homes (layer u8, base u64, path), names (kind u8, home u16, real u64,
		     name): publish. u8: done */
		publish();
		break;
	case 'D': /* id: forget a directory, of which nothing must be known */
		facts_forget(&gate.facts, number(8));
		break;
	case 'R': /* id, name: retract. u8: done */
		directory = facts_directory(&gate.facts, number(8));
		{
			size_t length;
			const char *name = string(&length);

			put_number(directory && facts_retract(&gate.facts, directory, name, length), 1);
		}
		break;
	case 'v': /* id, name: it vanishes */
		directory = facts_directory(&gate.facts, number(8));
		{
			size_t length;
			const char *name = string(&length);

			if (directory)
				facts_vanish(&gate.facts, directory, name, length);
		}
		break;
	case 'A': /* id, name: adopt. u64: lookups */
		directory = facts_directory(&gate.facts, number(8));
		position = position_in(directory);
		put_number(position < 0 ? 0 : gate_adopt(&gate, directory, (uint32_t)position), 8);
		break;
	case 'B': /* id, name, kind u8: give back */
		directory = facts_directory(&gate.facts, number(8));
		position = position_in(directory);
		if (position >= 0)
			facts_give_back(directory, (uint32_t)position, (uint8_t)number(1));
		break;
	case 'T': /* id, path: its attributes are told */
		id = number(8);
		path = path_operand();
		told = gate_tell(&gate, id);
		told->has_attributes = !lstat(path, &told->attributes);
		free(path);
		break;
	case 'Q': /* id: it has no capability */
		gate_tell(&gate, number(8))->no_capability = true;
		break;
	case 'V': /* id: nothing is told of it */
		gate_untell(&gate, number(8));
		break;
	case 'E': /* handle, writes u8, path: lend. u8: done */
		id = number(8);
		{
			bool writes = number(1);

			path = path_operand();
			fd = open(path, O_RDWR | O_CLOEXEC);
			free(path);
			put_number(gate_lend(&gate, id, fd, writes), 1);
			end_lending(id);
			map_put(&lending, id, (void *)(uintptr_t)(fd + 1));
		}
		break;
	case 'Y': /* handle: take back */
		id = number(8);
		gate_take_back(&gate, id);
		end_lending(id);
		break;
	case 'u': /* u8: whether files are opened without asking */
		gate.openless = number(1);
		break;
	case 'd': /* u8: whether directories are */
		gate.opendirless = number(1);
		break;
	case 'l': /* directories are opened and released by calls */
		gate.open_directory = on_open_directory;
		gate.release_directory = on_release_directory;
		break;
	case 'o': /* handles of directories that are open: u64 each */
		for (uint32_t at = 1; at <= directory_handles; at++)
			if (open_directories[at])
				put_number(DIRECTORY_HANDLES + at, 8);
		break;
	case 'W': /* u8: whether writes are held */
		gate.holds_writes = number(1);
		break;
	case 'w': /* until no write is under way */
		workers_settle();
		break;
	case 'O': /* two flags u64: what INIT offered, what is asked for */
		gate.init_flags = number(8);
		gate.extra_init_flags = number(8);
		break;
	case 'M': /* stack depth u32, lowers u8: passthrough, and of lower files */
		gate.stack_depth = (uint32_t)number(4);
		gate.passes_lowers = number(1);
		break;
	case 'J': /* handle, node, allowed u8: opened by Python. i32: id of the backing file */
		id = number(8);
		{
			uint64_t node = number(8);
			int32_t backing = backing_open(&gate, node, -1, number(1));

			if (backing > 0)
				map_put(&gate.backed, id, (void *)(uintptr_t)backing);
			put_number((uint32_t)backing, 4);
		}
		break;
	case 'j': /* handle, node: released */
		map_take(&gate.backed, number(8));
		backing_close(&gate, number(8));
		break;
	case 'Z': /* opcode u32, the rest: libfuse's payload for it. The packet that goes out */
		libfuse_replies();
		break;
	case 'C': /* id: claim */
		map_put(&gate.facts.claimed, number(8), NULL);
		break;
	case 'U': /* id: unclaim */
		map_take(&gate.facts.claimed, number(8));
		break;
	case 'H': /* id: does the kernel hold objects of a directory? u8 */
		directory = facts_directory(&gate.facts, number(8));
		if (directory && directory->known)
			directory->let_go = true;
		put_number(directory && directory->known, 1);
		break;
	case 'K': /* id: u64 lookups, 0: not known; u64 directory */
		known = map_get(&gate.facts.known, number(8));
		put_number(known ? known->lookups : 0, 8);
		put_number(known ? known->directory->id : 0, 8);
		break;
	case 'S': /* handle, id, parent, count u32, names: list */
		list();
		break;
	case 'X': /* node, path: its open files read that one. u32: how many */
		id = number(8);
		path = path_operand();
		fd = open(path, O_RDONLY | O_CLOEXEC);
		free(path);
		put_number((uint64_t)files_switch(&gate.files, id, fd), 4);
		close(fd);
		break;
	case 'G': /* u8: whether replies go nowhere from now on, as when whoever asked was killed */
		if (number(1)) {
			unplugged = gate.device;
			gate.device = open("/dev/null", O_RDONLY | O_CLOEXEC);
		} else {
			close(gate.device);
			gate.device = unplugged;
		}
		break;
	case 'F': /* u8: wait for a reply; the rest: a frame. u8 verdict, u32 + bytes: the frame as it is now, u32
		     replies, each u32 + bytes, u32 directories let go of, u64 each */
		frame();
		break;
	case 'N': /* u64 each: names, bytes, known, claimed, open files, listings, slots of `known`, bytes taken from
		     malloc (0 under ASan), backing files, nodes that are open, 64 natively, 64 passed */
		put_number(gate.facts.names, 8);
		put_number(gate.facts.bytes, 8);
		put_number(gate.facts.known.used, 8);
		put_number(gate.facts.claimed.used, 8);
		put_number(gate.files.open, 8);
		put_number(gate.listings.used, 8);
		put_number(gate.facts.known.slots ? gate.facts.known.mask + 1 : 0, 8);
		{
			struct mallinfo2 info = mallinfo2();

			put_number(info.uordblks + info.hblkhd, 8);
		}
		put_number(backing_count, 8);
		put_number(gate.ways.used, 8);
		put(gate.natively, sizeof(gate.natively));
		put(gate.passed, sizeof(gate.passed));
		break;
	default:
		fail("no such command");
	}
}

static bool get(void *data, size_t size)
{
	return fread(data, 1, size, stdin) == size;
}

int main(void)
{
	uint32_t size;

	if (chdir("/proc")) /* as the daemon: answer.c has_no_xattrs */
		fail("no /proc");
	while (get(&size, sizeof(size))) {
		if (size > sizeof(in) || !get(in, size))
			fail("a command is too long, or cut");
		in_size = size;
		in_at = out_size = 0;
		command();
		size = (uint32_t)out_size;
		if (fwrite(&size, 1, sizeof(size), stdout) != sizeof(size) ||
		    fwrite(out, 1, out_size, stdout) != out_size || fflush(stdout))
			fail("nobody listens");
	}
	gate_free(&gate); /* what is left then is a leak */
	map_free(&lending);
	return 0;
}
