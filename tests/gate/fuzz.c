/*
 * A target for libFuzzer: frames from the kernel and replies of libfuse, any bytes, in any order, over a small
 * directory ($LAYERFS_FUZZ_DIR). `test_fuzz.py` compiles it (with hook.c inside) and makes the first inputs.
 *
 * An input is a byte of options and steps: a kind (u8), a length (u16) and that many bytes.
 *   0  a frame as it is
 *   1  opcode u8, node u8 (which of those known here), handle u8 (which), the rest of the body
 *   2  the reply to a frame that was passed: which u8, error u8, where the parts end u8, payload
 *   3  what vfs does: what u8, name u8
 */
#define _GNU_SOURCE
#include <poll.h>
/* Nothing else is on its way. */
#define ppoll(fds, count, timeout, mask) ((void)(fds), (void)(timeout), 0)
#include "hook.c"

#include <dirent.h>
#include <linux/openat2.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>

#define ROOT 1
#define BASE (UINT64_C(1) << 48)
#define LISTS_ROOT 5
#define NAMES 32
#define BUFFER (1 << 20)

#define LENT 6

static int layer, device, kernel, backing;
static char names[NAMES][256];
static uint64_t reals[NAMES];
static uint8_t kinds[NAMES];
static unsigned count;
static struct gate gate;

ssize_t hook_receive_unlocked(struct gate *which, int fd, void *buffer, size_t size)
{
	return hook_receive(which, fd, buffer, size);
}

static uint64_t open_directory(uint64_t id)
{
	return facts_directory(&gate.facts, id) ? id + 100 : 0;
}

static void release_directory(uint64_t handle)
{
	(void)handle;
}

static void let_go(uint64_t id)
{
	if (facts_directory(&gate.facts, id)->known)
		abort();
}

static void carry(const void *frame, size_t size)
{
	if (size < sizeof(struct fuse_in_header) || !frame)
		abort();
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	const char *path = getenv("LAYERFS_FUZZ_DIR");
	int pair[2], size = 1 << 20;
	struct dirent *entry;
	DIR *listing;

	(void)argc;
	(void)argv;
	layer = path ? open(path, O_PATH | O_DIRECTORY | O_CLOEXEC) : -1;
	listing = path ? opendir(path) : NULL;
	if (layer < 0 || !listing || chdir("/proc") || socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, pair))
		abort();
	while ((entry = readdir(listing)) && count < NAMES) {
		if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, ".."))
			continue;
		strncpy(names[count], entry->d_name, sizeof(names[count]) - 1);
		reals[count] = entry->d_ino;
		kinds[count++] = strncmp(entry->d_name, "asked", 5) == 0 ? NAME_ASK
				 : entry->d_type == DT_DIR	   ? NAME_PLAIN_DIRECTORY
							   : NAME_PLAIN;
	}
	closedir(listing);
	backing = memfd_create("backing", MFD_CLOEXEC);
	device = pair[0];
	kernel = pair[1];
	setsockopt(device, SOL_SOCKET, SO_SNDBUF, &size, sizeof(size));
	setsockopt(kernel, SOL_SOCKET, SO_SNDBUF, &size, sizeof(size));
	return 0;
}

/* Sent in this run. */
static uint64_t requests;

static void begin(uint8_t options)
{
	struct directory *directory;
	uint32_t *order = calloc(NAMES, sizeof(*order));

	if (!gate_init(&gate, 4, RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS))
		abort();
	gate.device = device;
	requests = 0;
	gate.keeps_listings = true;
	gate.xattrs = options & 1;
	gate.carries = options & 2;
	gate.statfs = options & 4 ? layer : -1;
	gate.openless = options & 8;
	gate.opendirless = gate.openless && options & 16;
	gate.extra_init_flags = UINT64_C(0x5555555555555555);
	gate.let_go = let_go;
	if (options & 32) {
		gate.open_directory = open_directory;
		gate.release_directory = release_directory;
	}
	gate.carry = carry;
	hook_arm(&gate);
	directory = facts_prepare(&gate.facts, ROOT, count, 1);
	facts_home(directory, layer, "", 0, BASE);
	for (uint32_t at = 0; at < count; at++) {
		facts_name(&gate.facts, directory, names[at], strlen(names[at]), kinds[at], 0, reals[at]);
		order[at] = at;
	}
	facts_publish(&gate.facts, directory);
	if (!gate_list(&gate, LISTS_ROOT, ROOT, ROOT, order, count, true))
		abort();
}

/* -- steps ---------------------------------------------------------------------------------------------------------- */

static uint64_t passed[64];
static unsigned passed_count;

static void feed(const void *frame, size_t size)
{
	static uint8_t buffer[BUFFER];
	struct fuse_in_header in;
	ssize_t got;

	if (send(kernel, frame, size, 0) != (ssize_t)size)
		return;
	got = hook_receive(&gate, device, buffer, sizeof(buffer));
	if (got < (ssize_t)sizeof(in))
		return;
	memcpy(&in, buffer, sizeof(in));
	if ((size_t)got > size || (got < (ssize_t)size && (in.opcode != FUSE_BATCH_FORGET || in.len != (size_t)got)))
		abort(); /* nothing else is shortened, and that says so */
	if (passed_count < sizeof(passed) / sizeof(*passed))
		passed[passed_count++] = in.unique;
}

static void feed_made(const uint8_t *data, size_t size)
{
	static uint8_t frame[sizeof(struct fuse_in_header) + 8 + UINT16_MAX];
	const uint64_t handles[] = {0, LISTS_ROOT, 6, NATIVE_HANDLE, NATIVE_HANDLE | 1, NATIVE_HANDLE | 2, UINT64_MAX};
	struct fuse_in_header in = {0};
	size_t length = sizeof(in);
	uint64_t handle;

	if (size < 3)
		return;
	in.opcode = data[0];
	in.unique = ++requests * 2;
	in.nodeid = data[1] < count ? BASE | reals[data[1]] : data[1] == 0xff ? 0 : ROOT;
	handle = handles[data[2] % (sizeof(handles) / sizeof(*handles))];
	if (in.opcode != FUSE_LOOKUP && in.opcode != FUSE_OPEN && in.opcode != FUSE_GETXATTR) {
		memcpy(frame + length, &handle, sizeof(handle));
		length += sizeof(handle);
	}
	memcpy(frame + length, data + 3, size - 3);
	length += size - 3;
	in.len = (uint32_t)length;
	memcpy(frame, &in, sizeof(in));
	feed(frame, length);
}

/* What comes out is one packet, as long as its header says. */
static void answer(const uint8_t *data, size_t size)
{
	static uint8_t packet[BUFFER];
	struct fuse_out_header header = {0}, sent;
	struct iovec parts[3] = {{&header, sizeof(header)}};
	uint8_t *payload;
	size_t length, cut;
	ssize_t got;
	int used = 1;

	if (size < 3 || !passed_count)
		return;
	length = size - 3;
	cut = data[2] < length ? data[2] : length;
	header.unique = passed[data[0] % passed_count];
	header.error = data[1] & 1 ? -data[1] : 0;
	header.len = (uint32_t)(sizeof(header) + length);
	payload = malloc(length ? length : 1);
	memcpy(payload, data + 3, length);
	if (length)
		parts[used++] = (struct iovec){payload, data[2] == 0xff ? length : cut};
	if (length && data[2] != 0xff)
		parts[used++] = (struct iovec){payload + cut, length - cut};
	while (recv(kernel, packet, sizeof(packet), 0) > 0)
		;
	if (send_reply(device, parts, used, NULL) >= 0) {
		do { /* a reader's thread may have come first */
			got = recv(kernel, packet, sizeof(packet), 0);
			if (got < (ssize_t)sizeof(sent))
				abort();
			memcpy(&sent, packet, sizeof(sent));
		} while (got != (ssize_t)header.len || memcmp(&sent, &header, sizeof(sent)));
	}
	free(payload);
}

static void change(uint8_t what, uint8_t which)
{
	struct directory *directory = facts_directory(&gate.facts, ROOT);
	const char *name = names[which % count];
	int64_t position = facts_find(&gate.facts, directory, name, strlen(name));
	char fresh[] = {'n', (char)('a' + which % 26), '\0'};

	switch (what % 9) {
	case 0:
		gate_adopt(&gate, directory, (uint32_t)position);
		break;
	case 1:
		gate_adopt(&gate, directory, (uint32_t)position);
		facts_retract(&gate.facts, directory, name, strlen(name));
		break;
	case 2:
		facts_give_back(directory, (uint32_t)position, kinds[which % count]);
		break;
	case 3:
		facts_retract(&gate.facts, directory, fresh, strlen(fresh));
		break;
	case 4:
		if (directory->known)
			directory->let_go = true;
		break;
	case 5:
		gate_lend(&gate, LENT, backing, which & 1);
		gate.holds_writes = which & 2;
		break;
	case 6:
		gate_take_back(&gate, LENT);
		break;
	case 7: {
		struct told *told = gate_tell(&gate, BASE | reals[which % count]);

		told->has_attributes = which & 1;
		told->no_capability = which & 2;
		break;
	}
	case 8:
		gate_untell(&gate, BASE | reals[which % count]);
		break;
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static uint8_t packet[BUFFER];

	if (!size)
		return 0;
	passed_count = 0;
	begin(*data++);
	size--;
	while (size >= 3) {
		size_t length = data[1] | (size_t)data[2] << 8;
		uint8_t kind = data[0];

		data += 3;
		size -= 3;
		if (length > size)
			length = size;
		if (kind % 4 == 0)
			feed(data, length);
		else if (kind % 4 == 1)
			feed_made(data, length);
		else if (kind % 4 == 2)
			answer(data, length);
		else if (length >= 2 && count)
			change(data[0], data[1]);
		data += length;
		size -= length;
		while (recv(kernel, packet, sizeof(packet), 0) > 0)
			;
	}
	/* What the kernel has is what the directory says it has. */
	if (facts_directory(&gate.facts, ROOT)->known != gate.facts.known.used)
		abort();
	gate.device = -1; /* the next input's as well */
	gate_free(&gate);
	return 0;
}
