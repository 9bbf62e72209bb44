/*
 * The gate's C core: facts that vfs published, and answers made of them.
 *
 * One thread (pyfuse3's) calls everything here, so nothing is locked; only `worker_*` has threads of its own, which
 * see a descriptor and a buffer and nothing else.
 */
#ifndef LAYERFS_GATE_CORE_H
#define LAYERFS_GATE_CORE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>
#include <sys/types.h>

/* -- map.c: from a 64-bit key to a pointer; nothing is ever under 0 ------------------------------------------------ */

struct map_slot {
	uint64_t key;
	void *value;
};

struct map {
	struct map_slot *slots;
	size_t mask; /* slots - 1; 0: nothing allocated */
	size_t used;
};

void *map_get(const struct map *map, uint64_t key);
bool map_has(const struct map *map, uint64_t key);
/* False when there is no memory, or the key is 0; the map is as it was. */
bool map_put(struct map *map, uint64_t key, void *value);
void *map_take(struct map *map, uint64_t key);
void map_free(struct map *map);

/* -- facts.c: directories whose names are known, and the objects that the kernel got from here --------------------- */

/* `.` and `..`, which come first in every listing. */
#define DOTS 2

enum {
	NAME_ASK = 0,   /* Python knows */
	NAME_PLAIN = 1, /* an object of one lower, shown as it is there, but for its number */
	NAME_PLAIN_DIRECTORY = 2, /* such a directory: it has no xattrs, or Python is asked */
	NAME_GONE = 3,  /* there was such a name */
};

/* A lower directory that names of a merged directory lie in. */
struct home {
	char *path;      /* below `root`; empty: the root itself */
	uint64_t base;   /* what is or-ed to a real inode number to make the shown one */
	int root;        /* descriptor of the layer's root; not ours */
	int fd;          /* O_PATH descriptor, or -1; kept by `facts.open_homes` */
	uint32_t place;  /* there */
};

struct name {
	uint64_t real; /* inode number in its layer; 0: never plain */
	uint32_t text; /* offset in `directory.text` */
	uint16_t home;
	uint8_t length;
	uint8_t kind : 4;  /* NAME_* */
	uint8_t first : 4; /* it was NAME_ASK when it came: listed before the others. Never changes: see `facts_offset` */
};

struct directory {
	uint64_t id;
	struct name *names;
	uint32_t *index; /* hash table of positions in `names` + 1 */
	char *text;
	struct home *homes;
	uint32_t count, capacity, mask, text_used, text_capacity, home_count;
	uint32_t changes; /* names retracted so far */
	uint32_t published; /* names it had at first */
	uint32_t known; /* objects the kernel has by names of this directory, from the gate */
	bool let_go;    /* Python would let go of it when `known` is 0 */
};

/* An object that the kernel has from the gate alone: Python has no node for it. */
struct known {
	struct directory *directory;
	uint64_t id, lookups;
	uint32_t name; /* position in the directory's `names` */
};

struct facts {
	struct map directories; /* node id -> struct directory */
	struct map known;       /* node id -> struct known */
	struct map claimed;     /* node ids that Python has nodes for */
	struct home **open_homes;
	uint32_t home_limit, home_hand;
	uint64_t resolve; /* openat2's, for paths of homes */
	uint64_t hash_key[2];
	size_t bytes, names;
};

bool facts_init(struct facts *facts, uint32_t home_limit, uint64_t resolve);
void facts_free(struct facts *facts);

/* A directory to be filled; NULL without memory. Then `facts_publish`, or `facts_discard`. */
struct directory *facts_prepare(struct facts *facts, uint64_t id, uint32_t names, uint32_t homes);
bool facts_home(struct directory *directory, int root, const char *path, size_t length, uint64_t base);
bool facts_name(struct facts *facts, struct directory *directory, const char *name, size_t length, uint8_t kind,
		uint16_t home, uint64_t real);
bool facts_publish(struct facts *facts, struct directory *directory);
void facts_discard(struct facts *facts, struct directory *directory);
/* The directory is no more; objects of it that are known stay so: none must be. */
void facts_forget(struct facts *facts, uint64_t id);

struct directory *facts_directory(const struct facts *facts, uint64_t id);
/* Position in `names`, or -1: there is no such name. */
int64_t facts_find(const struct facts *facts, const struct directory *directory, const char *name, size_t length);
/*
 * What listings call the place behind a name; they are in its order, and it lasts as long as the directory does. Where the
 * kernel keeps listings (`keeps_listings`) it has one for all who open a directory, made by whoever reads on where it
 * ends (fs/fuse/readdir.c, fuse_add_dirent_to_cache), and goes on in it, by offset, for those who began with another.
 *
 * Names that came later are listed first, the last of them first of all: whoever makes or renames names while it lists
 * comes to an end.
 */
uint64_t facts_offset(const struct directory *directory, uint32_t position);
/* The name means something else from now on, or nothing: Python is asked. False: no memory, or so many names have come and
 * gone that keeping them is not worth it; the directory must be forgotten. */
bool facts_retract(struct facts *facts, struct directory *directory, const char *name, size_t length);

/* The name is gone, until it is retracted. Listings pass it over, so none has to be made anew. */
void facts_vanish(const struct facts *facts, struct directory *directory, const char *name, size_t length);

/* Whether the object has no xattrs at all. */
bool facts_bare(int directory, const char *name);
/* Python let go of the node of a name that means what it meant when it was published. */
void facts_give_back(struct directory *directory, uint32_t position, uint8_t kind);

/* lstat of a plain name. False: not as published (changed from outside, several links, an error): ask Python. */
bool facts_stat(struct facts *facts, struct directory *directory, uint32_t name, struct stat *st);
/* Where a plain name lies: a descriptor of its lower directory, or -1, and its name with the end that system calls want.
 * Valid until the next call of anything here. */
int facts_place(struct facts *facts, struct directory *directory, uint32_t name, char text[256]);

/* The object of a plain name that the kernel has, or NULL. */
struct known *facts_known(const struct facts *facts, const struct directory *directory, uint32_t name);
/* The object of a plain name, made if need be; NULL: ask Python. */
struct known *facts_know(struct facts *facts, struct directory *directory, uint32_t name);
/* `count` lookups less. True when its directory may be let go of now. */
bool facts_unknow(struct facts *facts, struct known *known, uint64_t count);
/* Python takes the object over: its lookup count, 0 when the kernel has not got it from here. Asked for the name from
 * now on is Python. */
uint64_t facts_adopt(struct facts *facts, struct directory *directory, uint32_t name);

/* -- files.c: files opened here ------------------------------------------------------------------------------------- */

#define NATIVE_HANDLE (UINT64_C(1) << 63)
/* In the handle of a WRITE on its way to Python: the writer has CAP_FSETID (fuse/adapter.py). */
#define KEEPS_SETID (UINT64_C(1) << 62)

struct file {
	uint64_t node;
	int fd;
	bool kept; /* nobody opened it */
	bool used; /* since `files_keep` last looked for one to close */
};

struct files {
	struct file *table;
	uint32_t *vacant;
	struct map kept; /* node id -> position in `table` + 1, of those that nobody opened */
	uint32_t count, capacity, vacancies, limit, open, hand;
};

/* A handle for `fd`, or 0: no room. */
uint64_t files_add(struct files *files, uint64_t node, int fd);
struct file *files_get(struct files *files, uint64_t handle);
void files_close(struct files *files, uint64_t handle);
/* All files of `node` read `fd` from now on, which stays the caller's. Number of files; -1 with errno. */
int files_switch(struct files *files, uint64_t node, int fd);
void files_free(struct files *files);
/*
 * Where the kernel opens files without asking (`gate.openless`) a descriptor is kept for each node that is read, as long as there is
 * room: what was not used for longest is closed.
 */
bool files_keep(struct files *files, uint64_t node, int fd);
/* The kept descriptor of a node, or -1. */
int files_kept(struct files *files, uint64_t node);
void files_drop(struct files *files, uint64_t node);

/* -- workers.c: threads for what may take the disk's time ----------------------------------------------------------- */

/* Reads in a thread, through a duplicate of `fd`, and replies; where there is no thread, or no descriptor, here. */
void worker_read(int device, uint64_t unique, int fd, uint64_t offset, uint32_t size);
/* The same with a copy of `data`, but false where there is no thread, descriptor or memory, or some writes are under way. */
bool worker_write(int device, uint64_t unique, int fd, uint64_t offset, const void *data, uint32_t size);
/* Waits until no write is under way. */
void workers_settle(void);

/* -- answer.c ------------------------------------------------------------------------------------------------------- */

enum verdict {
	ANSWERED,  /* by a reply, or there is none to make */
	PASSED,    /* for pyfuse3 */
	CARRIED,   /* for Python, but pyfuse3 cannot carry it */
};

#define OPCODES 64
#define BUCKETS 24

/* What Python said of an object that it has a node for. */
struct told {
	struct stat attributes; /* st_ino is the node id */
	bool has_attributes;
	bool no_capability; /* it has no security.capability */
};

/* A file that Python opened and lets the gate read, and write. */
struct lent {
	int fd; /* Python's, which takes it back before it closes it */
	bool writes;
	bool used; /* since Python asked last */
};

struct listing {
	uint64_t directory, parent;
	uint32_t *order; /* positions in the directory's names */
	uint32_t count;
	uint32_t changes; /* of the directory when `order` was made */
	bool fresh; /* not read from its start yet */
};

struct gate {
	struct facts facts;
	struct files files;
	struct map listings; /* handle of pyfuse3 -> struct listing */
	struct map told;     /* node id -> struct told */
	struct map lent;     /* handle of pyfuse3, node id where there are none -> struct lent */
	struct map asked;    /* unique -> opcode: what Python has not replied to */
	int device;
	int statfs; /* descriptor to ask, or -1 */
	int loop;   /* readable when the event loop has something to do, beside the device; -1: not to be had */
	uint64_t replied; /* when Python did, last */
	bool xattrs; /* users see them */
	bool carries; /* somebody takes CARRIED frames */
	bool hooked;
	/* Nothing ever changes, so the kernel may keep listings. While names come and go it cannot: a part that one reader was sent
	 * before a change may be put into the listing that another began after it (fs/fuse/readdir.c
	 * fuse_add_dirent_to_cache), and passes for what is there now. */
	bool keeps_listings;
	bool holds_writes; /* every WRITE is Python's */
	/* OPEN is answered by ENOSYS: from then on the kernel opens, flushes and releases without asking, and says which file it means by
	 * the node id alone (fs/fuse/file.c fuse_file_open). */
	bool openless;
	bool opendirless; /* OPENDIR, too: listings are by node id, and never change */
	uint32_t stack_depth; /* file systems that may lie on each other below this one; 0: no passthrough */
	bool passes_lowers; /* nothing is ever written, so lower files are open in passthrough, too */
	struct map ways;    /* node id -> struct way; with passthrough alone */
	struct map backed;  /* handle of pyfuse3 -> id of its backing file */
	int (*control)(int device, unsigned long request, ...); /* ioctl(2) */
	uint64_t init_flags; /* what the kernel offers */
	uint64_t extra_init_flags; /* asked for beside libfuse's, where the kernel offers them */
	uint64_t bytes_read, bytes_written;
	uint64_t natively[OPCODES], passed[OPCODES];
	/* Of those answered natively, how many took less than 2^k us and no less than half of that; the last: longer. */
	uint32_t took[OPCODES][BUCKETS];
	char *reply; /* room for a listing */
	size_t reply_size;
	/* Python may let go of this directory now */
	void (*let_go)(uint64_t id);
	/* Python's handle for a directory that is opened; 0: not without waiting for something */
	uint64_t (*open_directory)(uint64_t id);
	/* it was released; both NULL: Python gets the messages */
	void (*release_directory)(uint64_t handle);
	/* takes a CARRIED frame */
	void (*carry)(const void *frame, size_t size);
};

bool gate_init(struct gate *gate, uint32_t descriptors, uint64_t resolve);
void gate_free(struct gate *gate);
/* `size` may become smaller (BATCH_FORGET). */
enum verdict gate_answer(struct gate *gate, void *frame, size_t *size);
/* The open directory `handle` lists the names at the positions `order` (by `facts_offset`), which becomes the gate's. `fresh`: a read from
 * the start need not look again. False: no memory. */
bool gate_list(struct gate *gate, uint64_t handle, uint64_t directory, uint64_t parent, uint32_t *order, uint32_t count,
	       bool fresh);
/* Whether what `handle` lists is what is there now, as far as is known here. */
bool gate_lists_now(const struct gate *gate, uint64_t handle);
void gate_unlist(struct gate *gate, uint64_t handle);
/* Of `handle`, for the reply to its OPENDIR. */
uint32_t gate_listing_flags(const struct gate *gate, uint64_t handle);
/* What is told of a node, made if need be; NULL without memory. */
struct told *gate_tell(struct gate *gate, uint64_t id);
void gate_untell(struct gate *gate, uint64_t id);
/* `handle` may be read here through `fd`, and written, until it is taken back. False: no memory. */
bool gate_lend(struct gate *gate, uint64_t handle, int fd, bool writes);
void gate_take_back(struct gate *gate, uint64_t handle);
/* `facts_adopt`, and what was kept to read it by is closed. */
uint64_t gate_adopt(struct gate *gate, struct directory *directory, uint32_t name);
/* Asks the kernel to forget nodes that nobody uses, in this order. May be called by any thread; waits for pages of theirs that
 * are written back. 0, or -errno. */
int gate_prune(int device, const uint64_t *nodes, uint32_t count);
/* 0, or -errno. */
int gate_reply(int device, uint64_t unique, int error, const void *payload, size_t size);

/* -- backing.c: files that the kernel reads and writes itself ------------------------------------------------------- */

/* How a node is open, while it is. */
struct way {
	int32_t backing; /* id of the file that the kernel reads and writes; 0: it asks us, and keeps pages */
	uint32_t handles;
};

/* FUSE_PASSTHROUGH among the flags of INIT; older headers do not have it. */
#define INIT_PASSTHROUGH (UINT64_C(1) << 37)

struct fuse_open_out;
struct fuse_init_out;

/* A handle of `node`, whose file is `fd`, is about to be opened. `allowed`: in passthrough, should it be the only one. The
 * backing file's id, 0 when it goes the other way; `backing_close` follows its RELEASE. -1: no memory; nothing follows. */
int32_t backing_open(struct gate *gate, uint64_t node, int fd, bool allowed);
void backing_close(struct gate *gate, uint64_t node);
void backing_free(struct gate *gate);
/* Replies that say so. */
void backing_tell(struct fuse_open_out *opened, int32_t id);
void backing_init(const struct gate *gate, struct fuse_init_out *init);

/* -- hook.c: between libfuse and the device ------------------------------------------------------------------------- */

/* `library` (a path; loaded already) is the one whose calls of libfuse come here first; to be said before any does.
 * False: there is no such library. */
bool hook_serve(const char *library);
/* The next fuse_session_mount goes through `gate`; NULL: through libfuse alone. */
void hook_arm(struct gate *gate);
/* Python has replied, by another way than libfuse. */
void hook_replied(struct gate *gate);
/* The event loop is about to sleep: waits a moment for what comes right after a reply of Python's. */
void hook_look(const struct gate *gate);
/* As read(2) of the device, but -errno; EINTR when there is nothing for libfuse. */
ssize_t hook_receive(struct gate *gate, int device, void *buffer, size_t size);

#endif
