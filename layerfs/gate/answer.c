#define _GNU_SOURCE
#include "core.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/fs.h>
#include <linux/fuse.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/statvfs.h>
#include <sys/uio.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

/* Seconds the kernel may keep what it was told: only layerfs changes the tree, through that kernel. */
#define FOR_EVER 100000000
/* What a listing's reply may take; the kernel asks for less. */
#define LISTING_MAX (256 << 10)
/* The most that the kernel ever reads at once: max_pages is 16 bits. */
#define READ_MAX (256u << 20)
/* Bytes of a WRITE that is done in place. */
#define WRITE_MAX (128 << 10)

/* Not in the headers of older distributions. */
#define OPCODE_STATX 52
#define OPCODE_COPY_FILE_RANGE_64 53
#define OPCODE_TMPFILE 51

bool gate_init(struct gate *gate, uint32_t descriptors, uint64_t resolve)
{
	memset(gate, 0, sizeof(*gate));
	gate->device = gate->statfs = gate->loop = -1;
	gate->files.limit = descriptors;
	gate->control = ioctl;
	return facts_init(&gate->facts, descriptors / 4, resolve);
}

static void free_listing(struct listing *listing)
{
	if (listing)
		free(listing->order);
	free(listing);
}

void gate_free(struct gate *gate)
{
	for (size_t at = 0; gate->listings.slots && at <= gate->listings.mask; at++)
		free_listing(gate->listings.slots[at].value);
	for (size_t at = 0; gate->told.slots && at <= gate->told.mask; at++)
		free(gate->told.slots[at].value);
	map_free(&gate->told);
	for (size_t at = 0; gate->lent.slots && at <= gate->lent.mask; at++)
		free(gate->lent.slots[at].value);
	map_free(&gate->lent);
	map_free(&gate->listings);
	map_free(&gate->asked);
	backing_free(gate);
	files_free(&gate->files);
	facts_free(&gate->facts);
	free(gate->reply);
	if (gate->device >= 0)
		close(gate->device);
	memset(gate, 0, sizeof(*gate));
}

struct told *gate_tell(struct gate *gate, uint64_t id)
{
	struct told *told = map_get(&gate->told, id);

	if (told)
		return told;
	told = calloc(1, sizeof(*told));
	if (told && !map_put(&gate->told, id, told)) {
		free(told);
		return NULL;
	}
	return told;
}

void gate_untell(struct gate *gate, uint64_t id)
{
	free(map_take(&gate->told, id));
}

bool gate_lend(struct gate *gate, uint64_t handle, int fd, bool writes)
{
	struct lent *lent = map_get(&gate->lent, handle);

	if (!lent) {
		lent = malloc(sizeof(*lent));
		if (!lent || !map_put(&gate->lent, handle, lent)) {
			free(lent);
			return false;
		}
	}
	*lent = (struct lent){fd, writes, true};
	return true;
}

void gate_take_back(struct gate *gate, uint64_t handle)
{
	free(map_take(&gate->lent, handle));
}

uint64_t gate_adopt(struct gate *gate, struct directory *directory, uint32_t position)
{
	const struct name *name = &directory->names[position];

	if (name->kind == NAME_PLAIN)
		files_drop(&gate->files, directory->homes[name->home].base | name->real);
	return facts_adopt(&gate->facts, directory, position);
}

/* -- replies -------------------------------------------------------------------------------------------------------- */

int gate_reply(int device, uint64_t unique, int error, const void *payload, size_t size)
{
	struct fuse_out_header header = {
		.len = (uint32_t)(sizeof(header) + (error ? 0 : size)), .error = -error, .unique = unique};
	struct iovec parts[2] = {{&header, sizeof(header)}, {(void *)payload, size}};

	return writev(device, parts, error || !size ? 1 : 2) < 0 ? -errno : 0;
}

/* linux/fuse.h 7.45 */
#define NOTIFY_PRUNE 9

int gate_prune(int device, const uint64_t *nodes, uint32_t count)
{
	struct fuse_notify_prune_out {
		uint32_t count;
		uint32_t padding;
		uint64_t spare;
	} out = {.count = count};
	struct fuse_out_header header = {.error = NOTIFY_PRUNE};
	struct iovec parts[3] = {{&header, sizeof(header)}, {&out, sizeof(out)}, {(void *)nodes, count * sizeof(*nodes)}};

	header.len = (uint32_t)(sizeof(header) + sizeof(out) + parts[2].iov_len);
	return writev(device, parts, 3) < 0 ? -errno : 0;
}

static enum verdict reply(struct gate *gate, const struct fuse_in_header *in, int error, const void *payload,
			  size_t size)
{
	gate_reply(gate->device, in->unique, error, payload, size);
	return ANSWERED;
}

/* For `size` bytes of a reply, in `gate->reply`. */
static bool make_room(struct gate *gate, size_t size)
{
	char *larger;

	if (gate->reply_size >= size)
		return true;
	larger = realloc(gate->reply, size);
	if (!larger)
		return false;
	gate->reply = larger;
	gate->reply_size = size;
	return true;
}

static void fill(struct fuse_attr *attr, const struct stat *st, uint64_t id)
{
	*attr = (struct fuse_attr){
		.ino = id,
		.size = (uint64_t)st->st_size,
		.blocks = (uint64_t)st->st_blocks,
		.atime = (uint64_t)st->st_atim.tv_sec,
		.mtime = (uint64_t)st->st_mtim.tv_sec,
		.ctime = (uint64_t)st->st_ctim.tv_sec,
		.atimensec = (uint32_t)st->st_atim.tv_nsec,
		.mtimensec = (uint32_t)st->st_mtim.tv_nsec,
		.ctimensec = (uint32_t)st->st_ctim.tv_nsec,
		.mode = st->st_mode,
		.nlink = (uint32_t)st->st_nlink,
		.uid = st->st_uid,
		.gid = st->st_gid,
		.rdev = (uint32_t)st->st_rdev,
		.blksize = (uint32_t)st->st_blksize,
	};
}

static struct fuse_entry_out entry_of(const struct stat *st, uint64_t id)
{
	struct fuse_entry_out out = {.nodeid = id, .entry_valid = FOR_EVER, .attr_valid = FOR_EVER};

	fill(&out.attr, st, id);
	return out;
}

/* -- looking -------------------------------------------------------------------------------------------------------- */

static void forget(struct gate *gate, struct known *known, uint64_t count)
{
	uint64_t directory = known->directory->id, id = known->id;
	bool let_go = facts_unknow(&gate->facts, known, count);

	if (!map_has(&gate->facts.known, id))
		files_drop(&gate->files, id);
	if (let_go && gate->let_go)
		gate->let_go(directory);
}

static enum verdict lookup(struct gate *gate, const struct fuse_in_header *in, const char *body, size_t size)
{
	struct directory *directory = facts_directory(&gate->facts, in->nodeid);
	size_t length = strnlen(body, size);
	struct fuse_entry_out out;
	struct known *known;
	struct stat st;
	int64_t found;

	if (!directory || length == size || length > 255)
		return PASSED;
	found = facts_find(&gate->facts, directory, body, length);
	if (found < 0 || directory->names[found].kind == NAME_GONE) {
		if (body[0] == '.' && (!body[1] || (body[1] == '.' && !body[2])))
			return PASSED;
		out = (struct fuse_entry_out){.entry_valid = FOR_EVER};
		return reply(gate, in, 0, &out, sizeof(out));
	}
	if (!facts_stat(&gate->facts, directory, (uint32_t)found, &st))
		return PASSED;
	known = facts_know(&gate->facts, directory, (uint32_t)found);
	if (!known)
		return PASSED;
	known->lookups++;
	out = entry_of(&st, known->id);
	/* Nobody waits for it any more: the kernel has not got the object. */
	if (gate_reply(gate->device, in->unique, 0, &out, sizeof(out)))
		forget(gate, known, 1);
	return ANSWERED;
}

static enum verdict getattr(struct gate *gate, const struct fuse_in_header *in)
{
	struct known *known = map_get(&gate->facts.known, in->nodeid);
	struct told *told = known ? NULL : map_get(&gate->told, in->nodeid);
	struct fuse_attr_out out = {.attr_valid = FOR_EVER};
	struct stat st;

	if (told && told->has_attributes) {
		fill(&out.attr, &told->attributes, in->nodeid);
		return reply(gate, in, 0, &out, sizeof(out));
	}
	if (!known || !facts_stat(&gate->facts, known->directory, known->name, &st))
		return PASSED;
	fill(&out.attr, &st, known->id);
	return reply(gate, in, 0, &out, sizeof(out));
}

static enum verdict forget_one(struct gate *gate, const struct fuse_in_header *in, const void *body, size_t size)
{
	struct known *known = map_get(&gate->facts.known, in->nodeid);
	struct fuse_forget_in arg;

	if (!known || size < sizeof(arg))
		return PASSED;
	memcpy(&arg, body, sizeof(arg));
	forget(gate, known, arg.nlookup);
	return ANSWERED;
}

/* Those that Python knows stay in the frame. */
static enum verdict forget_many(struct gate *gate, struct fuse_in_header *in, char *body, size_t *frame_size)
{
	struct fuse_batch_forget_in arg;
	struct fuse_forget_one one;
	size_t size = *frame_size - sizeof(*in), kept = 0;
	char *ones = body + sizeof(arg);

	if (size < sizeof(arg))
		return PASSED;
	memcpy(&arg, body, sizeof(arg));
	if (arg.count > (size - sizeof(arg)) / sizeof(one))
		return PASSED;
	for (uint32_t at = 0; at < arg.count; at++) {
		struct known *known;

		memcpy(&one, ones + at * sizeof(one), sizeof(one));
		known = map_get(&gate->facts.known, one.nodeid);
		if (known)
			forget(gate, known, one.nlookup);
		else
			memmove(ones + kept++ * sizeof(one), &one, sizeof(one));
	}
	if (!kept)
		return ANSWERED;
	arg.count = (uint32_t)kept;
	memcpy(body, &arg, sizeof(arg));
	*frame_size = sizeof(*in) + sizeof(arg) + kept * sizeof(one);
	in->len = (uint32_t)*frame_size;
	return PASSED;
}

/* As facts_place. */
static int place_of(struct gate *gate, const struct known *known, char text[256])
{
	return facts_place(&gate->facts, known->directory, known->name, text);
}

static enum verdict readlink_of(struct gate *gate, const struct fuse_in_header *in)
{
	struct known *known = map_get(&gate->facts.known, in->nodeid);
	char text[256], target[PATH_MAX];
	ssize_t length;
	int fd;

	if (!known || (fd = place_of(gate, known, text)) < 0)
		return PASSED;
	length = readlinkat(fd, text, target, sizeof(target));
	if (length <= 0 || length == sizeof(target))
		return PASSED;
	return reply(gate, in, 0, target, (size_t)length);
}

/* The kernel does before the first write to a file. */
static bool asks_for_capability(const struct gate *gate, const struct fuse_in_header *in, const char *body, size_t size)
{
	static const char name[] = "security.capability";
	const struct told *told = map_get(&gate->told, in->nodeid);

	return told && told->no_capability && size >= sizeof(struct fuse_getxattr_in) + sizeof(name) &&
	       !memcmp(body + sizeof(struct fuse_getxattr_in), name, sizeof(name));
}

static enum verdict xattr(struct gate *gate, const struct fuse_in_header *in, const void *body, size_t size)
{
	struct known *known = map_get(&gate->facts.known, in->nodeid);
	struct fuse_getxattr_in arg;
	struct fuse_getxattr_out out = {0};
	char text[256];
	int fd;

	if (in->opcode == FUSE_GETXATTR && asks_for_capability(gate, in, body, size))
		return reply(gate, in, ENODATA, NULL, 0);
	if (!gate->xattrs || !known || size < sizeof(arg) || (fd = place_of(gate, known, text)) < 0)
		return PASSED;
	if (!facts_bare(fd, text))
		return PASSED;
	memcpy(&arg, body, sizeof(arg));
	if (in->opcode == FUSE_GETXATTR)
		return reply(gate, in, ENODATA, NULL, 0);
	return reply(gate, in, 0, &out, arg.size ? 0 : sizeof(out));
}

static enum verdict statfs(struct gate *gate, const struct fuse_in_header *in)
{
	struct fuse_statfs_out out = {0};
	struct statvfs st;

	if (gate->statfs < 0 || fstatvfs(gate->statfs, &st))
		return PASSED;
	out.st = (struct fuse_kstatfs){
		.blocks = st.f_blocks,
		.bfree = st.f_bfree,
		.bavail = st.f_bavail,
		.files = st.f_files,
		.ffree = st.f_ffree,
		.bsize = (uint32_t)st.f_bsize,
		.frsize = (uint32_t)st.f_frsize,
		.namelen = 255,
	};
	return reply(gate, in, 0, &out, sizeof(out));
}

/* -- listing -------------------------------------------------------------------------------------------------------- */

bool gate_list(struct gate *gate, uint64_t handle, uint64_t directory, uint64_t parent, uint32_t *order, uint32_t count,
	       bool fresh)
{
	struct listing *listing = malloc(sizeof(*listing));
	struct directory *listed = facts_directory(&gate->facts, directory);

	gate_unlist(gate, handle);
	if (!listing || !listed) {
		free(listing);
		return false;
	}
	*listing = (struct listing){directory, parent, order, count, listed->changes, fresh};
	if (map_put(&gate->listings, handle, listing))
		return true;
	free(listing);
	return false;
}

bool gate_lists_now(const struct gate *gate, uint64_t handle)
{
	const struct listing *listing = map_get(&gate->listings, handle);
	const struct directory *directory = listing ? facts_directory(&gate->facts, listing->directory) : NULL;

	return !directory || listing->changes == directory->changes;
}

void gate_unlist(struct gate *gate, uint64_t handle)
{
	free_listing(map_take(&gate->listings, handle));
}

static bool add(char *room, size_t size, size_t *used, const char *text, size_t length, uint64_t next, uint32_t type,
		uint64_t ino, const struct fuse_entry_out *entry)
{
	struct fuse_direntplus item = {.dirent = {.ino = ino, .off = next, .namelen = (uint32_t)length, .type = type}};
	size_t whole = FUSE_DIRENT_ALIGN(FUSE_NAME_OFFSET_DIRENTPLUS + length);

	if (size - *used < whole)
		return false;
	/* Without a node id it is a name and a type alone; `.` and `..` are always that. */
	if (entry)
		item.entry_out = *entry;
	memset(room + *used, 0, whole);
	memcpy(room + *used, &item, FUSE_NAME_OFFSET_DIRENTPLUS);
	memcpy(room + *used + FUSE_NAME_OFFSET_DIRENTPLUS, text, length);
	*used += whole;
	return true;
}

/* Index in `order` of the first name behind an offset. */
static uint32_t index_behind(const struct listing *listing, const struct directory *directory, uint64_t offset)
{
	uint32_t low = 0, high = listing->count;

	while (low < high) {
		uint32_t middle = low + (high - low) / 2;

		if (facts_offset(directory, listing->order[middle]) <= offset)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

/* As many names as fit, up to one that only Python knows. */
static enum verdict readdirplus(struct gate *gate, const struct fuse_in_header *in, const void *body, size_t size)
{
	struct fuse_read_in arg;
	struct listing *listing;
	struct directory *directory;
	size_t used = 0, room;
	bool by_node;
	enum verdict other;
	uint64_t at;

	if (size < sizeof(arg))
		return PASSED;
	memcpy(&arg, body, sizeof(arg));
	by_node = gate->opendirless && !arg.fh;
	other = by_node ? CARRIED : PASSED;
	listing = map_get(&gate->listings, by_node ? in->nodeid : arg.fh);
	if (!listing || !(directory = facts_directory(&gate->facts, listing->directory)))
		return other;
	/* It must be what is there now, or Python lists anew. */
	if (!by_node && ((arg.offset == 0 && !listing->fresh) || listing->changes != directory->changes))
		return PASSED;
	room = arg.size < LISTING_MAX ? arg.size : LISTING_MAX;
	if (!make_room(gate, room))
		return other;
	for (at = arg.offset; at < DOTS; at++) {
		uint64_t ino = at == 0 ? listing->directory : listing->parent;

		if (!add(gate->reply, room, &used, "..", at + 1, at + 1, S_IFDIR >> 12, ino, NULL))
			break;
	}
	for (uint32_t index = index_behind(listing, directory, arg.offset); at >= DOTS && index < listing->count; index++) {
		uint32_t position = listing->order[index];
		const struct name *name = &directory->names[position];
		struct fuse_entry_out entry;
		struct known *known;
		struct stat st;

		if (name->kind == NAME_GONE)
			continue;
		if (room - used < FUSE_DIRENT_ALIGN(FUSE_NAME_OFFSET_DIRENTPLUS + name->length))
			break;
		if (!facts_stat(&gate->facts, directory, position, &st) ||
		    !(known = facts_know(&gate->facts, directory, position))) {
			if (used)
				break;
			return other;
		}
		entry = entry_of(&st, known->id);
		add(gate->reply, room, &used, directory->text + name->text, name->length, facts_offset(directory, position),
		    st.st_mode >> 12, known->id, &entry);
		known->lookups++;
	}
	if (arg.offset == 0)
		listing->fresh = false;
	if (!gate_reply(gate->device, in->unique, 0, gate->reply, used))
		return ANSWERED;
	/* It did not arrive: nothing of it is known. */
	for (size_t offset = 0; offset < used;) {
		struct fuse_direntplus item;
		struct known *known;

		memcpy(&item, gate->reply + offset, FUSE_NAME_OFFSET_DIRENTPLUS);
		known = map_get(&gate->facts.known, item.entry_out.nodeid);
		if (item.entry_out.nodeid && known)
			forget(gate, known, 1);
		offset += FUSE_DIRENT_ALIGN(FUSE_NAME_OFFSET_DIRENTPLUS + item.dirent.namelen);
	}
	return ANSWERED;
}

/* -- data ----------------------------------------------------------------------------------------------------------- */

/* Closes a file that was opened here. */
static void close_file(struct gate *gate, uint64_t handle)
{
	struct file *file = files_get(&gate->files, handle);

	if (file && gate->stack_depth)
		backing_close(gate, file->node);
	files_close(&gate->files, handle);
}

/* Whether the kernel takes the file as it takes others of the node; in passthrough, wherever lower files may be. */
static bool choose_way(struct gate *gate, struct fuse_open_out *out, uint64_t node, int fd)
{
	int32_t id;

	if (!gate->stack_depth)
		return true;
	id = backing_open(gate, node, fd, gate->passes_lowers);
	if (id > 0)
		backing_tell(out, id);
	return id >= 0;
}

/* Opens a known regular file for reading; -1: Python must. */
static int open_known(struct gate *gate, const struct known *known)
{
	struct stat st;
	char text[256];
	int flags = O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC;
	int home, fd;

	if (!facts_stat(&gate->facts, known->directory, known->name, &st) || !S_ISREG(st.st_mode))
		return -1;
	if ((home = place_of(gate, known, text)) < 0)
		return -1;
	fd = openat(home, text, flags | O_NOATIME);
	if (fd < 0 && errno == EPERM)
		fd = openat(home, text, flags);
	if (fd < 0)
		return -1;
	/* Data of a file with the metacopy mark lie elsewhere; and it may be another file by now. */
	if (!fstat(fd, &st) && S_ISREG(st.st_mode) && (known->id & ((UINT64_C(1) << 48) - 1)) == st.st_ino &&
	    flistxattr(fd, NULL, 0) == 0)
		return fd;
	close(fd);
	return -1;
}

static enum verdict open_file(struct gate *gate, const struct fuse_in_header *in, const void *body, size_t size)
{
	struct known *known = map_get(&gate->facts.known, in->nodeid);
	struct fuse_open_in arg;
	struct fuse_open_out out = {.open_flags = FOPEN_KEEP_CACHE};
	int fd;

	if (gate->openless)
		return reply(gate, in, ENOSYS, NULL, 0);
	if (!known || size < sizeof(arg))
		return PASSED;
	memcpy(&arg, body, sizeof(arg));
	if ((arg.flags & O_ACCMODE) != O_RDONLY || arg.flags & O_TRUNC || gate->files.open >= gate->files.limit)
		return PASSED;
	/* The kernel opens the lower file so, and it may not know it. */
	if (gate->passes_lowers && arg.flags & O_DIRECT)
		return PASSED;
	fd = open_known(gate, known);
	if (fd < 0)
		return PASSED;
	if (!(out.fh = files_add(&gate->files, known->id, fd))) {
		close(fd);
		return PASSED;
	}
	if (!choose_way(gate, &out, known->id, fd)) {
		files_close(&gate->files, out.fh);
		return PASSED;
	}
	if (gate_reply(gate->device, in->unique, 0, &out, sizeof(out)))
		close_file(gate, out.fh);
	return ANSWERED;
}

uint32_t gate_listing_flags(const struct gate *gate, uint64_t handle)
{
	/* Of directories without facts the offsets do not last: see facts_offset. */
	return gate->keeps_listings && map_has(&gate->listings, handle) ? FOPEN_CACHE_DIR | FOPEN_KEEP_CACHE : 0;
}

/* Python has the handle and the names; a call costs less than a message. */
static enum verdict open_directory(struct gate *gate, const struct fuse_in_header *in)
{
	struct fuse_open_out out = {0};

	if (gate->opendirless)
		return reply(gate, in, ENOSYS, NULL, 0);
	out.fh = gate->open_directory ? gate->open_directory(in->nodeid) : 0;
	if (!out.fh)
		return PASSED;
	out.open_flags = gate_listing_flags(gate, out.fh);
	if (gate_reply(gate->device, in->unique, 0, &out, sizeof(out))) {
		gate_unlist(gate, out.fh);
		gate->release_directory(out.fh);
	}
	return ANSWERED;
}

/* What a message without a handle means; -1: Python knows. */
static int descriptor_of(struct gate *gate, uint64_t node)
{
	struct lent *lent = map_get(&gate->lent, node);
	struct known *known;
	int fd;

	if (lent) {
		lent->used = true;
		return lent->fd;
	}
	fd = files_kept(&gate->files, node);
	if (fd >= 0)
		return fd;
	known = map_get(&gate->facts.known, node);
	fd = known ? open_known(gate, known) : -1;
	if (fd >= 0 && !files_keep(&gate->files, node, fd)) {
		close(fd);
		fd = -1;
	}
	return fd;
}

static enum verdict read_file(struct gate *gate, const struct fuse_in_header *in, const void *body, size_t size)
{
	struct fuse_read_in arg;
	struct file *file;
	struct lent *lent;
	struct stat st;
	struct iovec part;
	ssize_t got;
	int fd;

	if (size < sizeof(arg))
		return PASSED;
	memcpy(&arg, body, sizeof(arg));
	if (gate->openless && !arg.fh) {
		fd = descriptor_of(gate, in->nodeid);
		if (fd < 0)
			return CARRIED;
	} else if (arg.fh & NATIVE_HANDLE) {
		file = files_get(&gate->files, arg.fh);
		if (!file)
			return reply(gate, in, EBADF, NULL, 0);
		fd = file->fd;
	} else {
		lent = map_get(&gate->lent, arg.fh);
		if (!lent)
			return PASSED;
		fd = lent->fd;
	}
	if (arg.size > READ_MAX || arg.offset > INT64_MAX) /* preadv2 takes -1 for "where it is" */
		return reply(gate, in, EINVAL, NULL, 0);
	if (!make_room(gate, arg.size))
		return reply(gate, in, ENOMEM, NULL, 0);
	part = (struct iovec){gate->reply, arg.size};
	got = preadv2(fd, &part, 1, (off_t)arg.offset, RWF_NOWAIT);
	if (got >= 0 && ((uint32_t)got == arg.size ||
			 (!fstat(fd, &st) && (off_t)(arg.offset + (uint64_t)got) >= st.st_size))) {
		gate->bytes_read += (size_t)got;
		return reply(gate, in, 0, gate->reply, (size_t)got);
	}
	if (got < 0 && errno != EAGAIN && errno != EOPNOTSUPP)
		return reply(gate, in, errno, NULL, 0);
	worker_read(gate->device, in->unique, fd, arg.offset, arg.size);
	gate->bytes_read += arg.size; /* fewer at the end of the file */
	return ANSWERED;
}

/* libfuse hands on no write_flags: the handle says what they would. */
static enum verdict pass_write(const struct gate *gate, struct fuse_write_in *arg, char *body)
{
	bool told = gate->init_flags & gate->extra_init_flags & FUSE_HANDLE_KILLPRIV_V2;

	if (told && !(arg->write_flags & FUSE_WRITE_KILL_SUIDGID)) {
		arg->fh |= KEEPS_SETID;
		memcpy(body, arg, sizeof(*arg));
	}
	return PASSED;
}

/* Nobody but the kernel that has HANDLE_KILLPRIV_V2 says when setuid has to go: it always does. */
static enum verdict carry_write(const struct gate *gate, struct fuse_write_in *arg, char *body)
{
	if (!(gate->init_flags & gate->extra_init_flags & FUSE_HANDLE_KILLPRIV_V2)) {
		arg->write_flags |= FUSE_WRITE_KILL_SUIDGID;
		memcpy(body, arg, sizeof(*arg));
	}
	return CARRIED;
}

/* What a worker may write. Of what the kernel writes back it does not look at a short count, so Python remembers an error
 * until the next fsync. */
static bool write_elsewhere(const struct gate *gate, const struct fuse_in_header *in, const struct fuse_write_in *arg,
			    int fd, const char *data)
{
	return !(arg->write_flags & FUSE_WRITE_CACHE) && arg->offset <= INT64_MAX &&
	       worker_write(gate->device, in->unique, fd, arg->offset, data, arg->size);
}

/* Small ones go into the page cache at once, larger ones take a thread. Whatever does not go through smoothly is Python's. */
static enum verdict write_file(struct gate *gate, const struct fuse_in_header *in, char *body, size_t size)
{
	struct fuse_write_in arg;
	struct fuse_write_out out = {0};
	struct lent *lent;
	bool openless, synced, mine;
	const char *data;

	if (size < sizeof(arg))
		return PASSED;
	memcpy(&arg, body, sizeof(arg));
	openless = gate->openless && !arg.fh;
	/* Of a file that Python opened with them it is not lent. */
	synced = openless && arg.flags & (O_SYNC | O_DSYNC);
	lent = gate->holds_writes || synced ? NULL : map_get(&gate->lent, openless ? in->nodeid : arg.fh);
	mine = lent && lent->writes && size - sizeof(arg) >= arg.size;
	data = body + sizeof(arg);
	if (mine && arg.size > WRITE_MAX && write_elsewhere(gate, in, &arg, lent->fd, data)) {
		lent->used = true;
		gate->bytes_written += arg.size; /* fewer where it fails */
		return ANSWERED;
	}
	if (!mine || arg.size > WRITE_MAX ||
	    pwrite(lent->fd, data, arg.size, (off_t)arg.offset) != (ssize_t)arg.size)
		return openless ? carry_write(gate, &arg, body) : pass_write(gate, &arg, body);
	lent->used = true;
	gate->bytes_written += arg.size;
	out.size = arg.size;
	return reply(gate, in, 0, &out, sizeof(out));
}

static enum verdict release(struct gate *gate, const struct fuse_in_header *in, const void *body, size_t size)
{
	struct fuse_release_in arg;

	if (size < sizeof(arg))
		return PASSED;
	memcpy(&arg, body, sizeof(arg));
	if (in->opcode == FUSE_RELEASEDIR)
		gate_unlist(gate, arg.fh);
	/* Of a file that was created before the first OPEN. */
	if (gate->openless && in->opcode == FUSE_RELEASE && !arg.fh)
		return reply(gate, in, 0, NULL, 0);
	if (arg.fh & NATIVE_HANDLE) {
		close_file(gate, arg.fh);
	} else {
		if (in->opcode != FUSE_RELEASEDIR || !gate->release_directory)
			return PASSED;
		gate->release_directory(arg.fh);
	}
	return reply(gate, in, 0, NULL, 0);
}

static enum verdict seek(struct gate *gate, const struct fuse_in_header *in, const void *body, size_t size, int fd)
{
	struct fuse_lseek_in arg;
	struct fuse_lseek_out out;
	off_t offset;

	if (size < sizeof(arg))
		return reply(gate, in, EINVAL, NULL, 0);
	memcpy(&arg, body, sizeof(arg));
	if (arg.whence != SEEK_DATA && arg.whence != SEEK_HOLE) /* the kernel knows the others itself */
		return reply(gate, in, EINVAL, NULL, 0);
	offset = lseek(fd, (off_t)arg.offset, (int)arg.whence);
	if (offset < 0)
		return reply(gate, in, errno, NULL, 0);
	out.offset = (uint64_t)offset;
	return reply(gate, in, 0, &out, sizeof(out));
}

/* The same of a file that the kernel opened without asking. */
static enum verdict on_node(struct gate *gate, const struct fuse_in_header *in, const void *body, size_t size)
{
	int fd;

	switch (in->opcode) {
	case FUSE_FLUSH: /* as Python says */
		return reply(gate, in, ENOSYS, NULL, 0);
	case FUSE_FSYNC: /* nothing of a lower was written */
		return map_has(&gate->facts.known, in->nodeid) ? reply(gate, in, 0, NULL, 0) : CARRIED;
	default:
		fd = descriptor_of(gate, in->nodeid);
		return fd < 0 ? CARRIED : seek(gate, in, body, size, fd);
	}
}

/* FSYNC, FLUSH, LSEEK of a file that was opened here. FLUSH and FSYNC have nothing to do: what was written was written
 * through other handles. */
static enum verdict on_file(struct gate *gate, const struct fuse_in_header *in, const void *body, size_t size)
{
	struct file *file;
	uint64_t handle;

	if (size < sizeof(handle))
		return PASSED;
	memcpy(&handle, body, sizeof(handle));
	if (gate->openless && !handle)
		return on_node(gate, in, body, size);
	if (!(handle & NATIVE_HANDLE))
		return in->opcode == FUSE_LSEEK ? CARRIED : PASSED;
	file = files_get(&gate->files, handle);
	if (!file)
		return reply(gate, in, EBADF, NULL, 0);
	if (in->opcode == FUSE_FLUSH)
		return reply(gate, in, ENOSYS, NULL, 0);
	if (in->opcode == FUSE_FSYNC) /* Python knows whether the file lies in the upper by now */
		return map_has(&gate->facts.known, file->node) || !gate->carries ? reply(gate, in, 0, NULL, 0) : CARRIED;
	return seek(gate, in, body, size, file->fd);
}

/* Flags and attributes of inodes are Python's; everything else is none that a file has. Every open() of Python's asks
 * whether it is a terminal. */
static enum verdict ioctl_of(struct gate *gate, const struct fuse_in_header *in, const void *body, size_t size)
{
	struct fuse_ioctl_in arg;

	if (size < sizeof(arg))
		return PASSED;
	memcpy(&arg, body, sizeof(arg));
	switch (arg.cmd) {
	case FS_IOC_GETFLAGS:
	case FS_IOC_SETFLAGS:
	case FS_IOC32_GETFLAGS:
	case FS_IOC32_SETFLAGS:
	case FS_IOC_FSGETXATTR:
	case FS_IOC_FSSETXATTR:
		return CARRIED;
	default:
		return reply(gate, in, ENOTTY, NULL, 0);
	}
}

/* libfuse keeps those of requests that it has not got, answers them by EAGAIN later, and the kernel sends them again. What was
 * answered here is done; what is carried looks for pending signals itself (vfs/caller.py). */
static enum verdict interrupt(struct gate *gate, const void *body, size_t size)
{
	struct fuse_interrupt_in arg;

	if (size < sizeof(arg))
		return PASSED;
	memcpy(&arg, body, sizeof(arg));
	return map_has(&gate->asked, arg.unique) ? PASSED : ANSWERED;
}

/* -- all ------------------------------------------------------------------------------------------------------------ */

static enum verdict decide(struct gate *gate, struct fuse_in_header *in, char *body, size_t *frame_size)
{
	size_t size = *frame_size - sizeof(*in);

	switch (in->opcode) {
	case FUSE_LOOKUP:
		return lookup(gate, in, body, size);
	case FUSE_GETATTR:
		return getattr(gate, in);
	case FUSE_FORGET:
		return forget_one(gate, in, body, size);
	case FUSE_BATCH_FORGET:
		return forget_many(gate, in, body, frame_size);
	case FUSE_INTERRUPT:
		return interrupt(gate, body, size);
	case FUSE_READLINK:
		return readlink_of(gate, in);
	case FUSE_GETXATTR:
	case FUSE_LISTXATTR:
		return xattr(gate, in, body, size);
	case FUSE_STATFS:
		return statfs(gate, in);
	case FUSE_OPENDIR:
		return open_directory(gate, in);
	case FUSE_FSYNCDIR: /* nothing was written */
		return gate->opendirless ? reply(gate, in, 0, NULL, 0) : PASSED;
	case FUSE_READDIRPLUS:
		return readdirplus(gate, in, body, size);
	case FUSE_OPEN:
		return open_file(gate, in, body, size);
	case FUSE_READ:
		return read_file(gate, in, body, size);
	case FUSE_WRITE:
		return write_file(gate, in, body, size);
	case FUSE_RELEASE:
	case FUSE_RELEASEDIR:
		return release(gate, in, body, size);
	case FUSE_FSYNC:
	case FUSE_FLUSH:
	case FUSE_LSEEK:
		return on_file(gate, in, body, size);
	case FUSE_IOCTL:
		return ioctl_of(gate, in, body, size);
	case FUSE_SETXATTR: /* the longer form, which libfuse reads short, says whether an ACL takes setgid away */
		return gate->init_flags & gate->extra_init_flags & FUSE_SETXATTR_EXT ? CARRIED : PASSED;
	case FUSE_FALLOCATE:
	case FUSE_COPY_FILE_RANGE:
	case OPCODE_TMPFILE:
	case OPCODE_STATX:
	case OPCODE_COPY_FILE_RANGE_64:
		return CARRIED;
	default:
		return PASSED;
	}
}

static uint64_t now_us(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
}

static void count(struct gate *gate, uint32_t opcode, uint64_t us)
{
	unsigned bucket = us ? 64 - (unsigned)__builtin_clzll(us) : 0;

	gate->natively[opcode]++;
	gate->took[opcode][bucket < BUCKETS ? bucket : BUCKETS - 1]++;
}

enum verdict gate_answer(struct gate *gate, void *frame, size_t *size)
{
	uint64_t began = now_us();
	struct fuse_in_header in;
	enum verdict verdict;
	uint32_t opcode;

	if (*size < sizeof(in))
		return PASSED; /* libfuse says so */
	memcpy(&in, frame, sizeof(in));
	opcode = in.opcode < OPCODES ? in.opcode : 0;
	verdict = decide(gate, &in, (char *)frame + sizeof(in), size);
	if (verdict == PASSED)
		memcpy(frame, &in, sizeof(in)); /* it may have become shorter */
	if (verdict == CARRIED && !gate->carries)
		verdict = reply(gate, &in, ENOSYS, NULL, 0);
	if (verdict == ANSWERED)
		count(gate, opcode, now_us() - began);
	else
		gate->passed[opcode]++;
	return verdict;
}
