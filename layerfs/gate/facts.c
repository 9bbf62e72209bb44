#define _GNU_SOURCE
#include "core.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/syscall.h>
#include <sys/xattr.h>
#include <unistd.h>

/* Names that may come to a directory after it was published: each is kept, as the offsets of listings count them. */
#define NEW_NAMES_MAX 65536
/* Real inode numbers that fit below the number of the layer (inodes/numbers.py). */
#define REAL_MAX ((UINT64_C(1) << 48) - 1)

/* -- hashing: names are the layers' authors', so the key is secret (SipHash-1-3, Aumasson and Bernstein) ------------ */

#define ROTATE(x, b) ((x) << (b) | (x) >> (64 - (b)))
#define ROUND \
	do { \
		v0 += v1; v1 = ROTATE(v1, 13) ^ v0; v0 = ROTATE(v0, 32); \
		v2 += v3; v3 = ROTATE(v3, 16) ^ v2; \
		v0 += v3; v3 = ROTATE(v3, 21) ^ v0; \
		v2 += v1; v1 = ROTATE(v1, 17) ^ v2; v2 = ROTATE(v2, 32); \
	} while (0)

static uint64_t hash(const uint64_t key[2], const char *text, size_t length)
{
	uint64_t v0 = key[0] ^ UINT64_C(0x736f6d6570736575), v1 = key[1] ^ UINT64_C(0x646f72616e646f6d);
	uint64_t v2 = key[0] ^ UINT64_C(0x6c7967656e657261), v3 = key[1] ^ UINT64_C(0x7465646279746573);
	uint64_t word;
	size_t left = length;

	for (; left >= 8; left -= 8, text += 8) {
		memcpy(&word, text, 8);
		v3 ^= word;
		ROUND;
		v0 ^= word;
	}
	word = 0;
	memcpy(&word, text, left);
	word |= (uint64_t)length << 56;
	v3 ^= word;
	ROUND;
	v0 ^= word;
	v2 ^= 0xff;
	ROUND;
	ROUND;
	ROUND;
	return v0 ^ v1 ^ v2 ^ v3;
}

/* -- the whole ------------------------------------------------------------------------------------------------------ */

bool facts_init(struct facts *facts, uint32_t home_limit, uint64_t resolve)
{
	memset(facts, 0, sizeof(*facts));
	facts->resolve = resolve;
	facts->home_limit = home_limit ? home_limit : 1;
	facts->open_homes = calloc(facts->home_limit, sizeof(*facts->open_homes));
	return facts->open_homes &&
	       getrandom(facts->hash_key, sizeof(facts->hash_key), 0) == (ssize_t)sizeof(facts->hash_key);
}

static size_t size_of(const struct directory *directory)
{
	size_t size = sizeof(*directory) + directory->capacity * sizeof(struct name) + directory->text_capacity +
		      directory->home_count * sizeof(struct home);

	return directory->index ? size + (directory->mask + 1) * sizeof(uint32_t) : size;
}

static void close_home(struct facts *facts, struct home *home)
{
	if (home->fd < 0)
		return;
	close(home->fd);
	home->fd = -1;
	facts->open_homes[home->place] = NULL;
}

void facts_discard(struct facts *facts, struct directory *directory)
{
	for (uint32_t at = 0; at < directory->home_count; at++) {
		close_home(facts, &directory->homes[at]);
		free(directory->homes[at].path);
	}
	free(directory->homes);
	free(directory->names);
	free(directory->index);
	free(directory->text);
	free(directory);
}

void facts_forget(struct facts *facts, uint64_t id)
{
	struct directory *directory = map_take(&facts->directories, id);

	if (!directory)
		return;
	facts->bytes -= size_of(directory);
	facts->names -= directory->count;
	facts_discard(facts, directory);
}

void facts_free(struct facts *facts)
{
	for (size_t at = 0; facts->known.slots && at <= facts->known.mask; at++)
		free(facts->known.slots[at].value);
	for (size_t at = 0; facts->directories.slots && at <= facts->directories.mask; at++)
		if (facts->directories.slots[at].key)
			facts_discard(facts, facts->directories.slots[at].value);
	map_free(&facts->known);
	map_free(&facts->directories);
	map_free(&facts->claimed);
	free(facts->open_homes);
	memset(facts, 0, sizeof(*facts));
}

/* -- publishing ----------------------------------------------------------------------------------------------------- */

static uint32_t slots_for(uint32_t names)
{
	uint32_t slots = 8;

	while (slots < names * 2)
		slots *= 2;
	return slots;
}

struct directory *facts_prepare(struct facts *facts, uint64_t id, uint32_t names, uint32_t homes)
{
	struct directory *directory = calloc(1, sizeof(*directory));
	uint32_t slots;

	if (!directory || names >= UINT32_MAX / 4) {
		free(directory);
		return NULL;
	}
	slots = slots_for(names);
	directory->id = id;
	directory->capacity = names ? names : 1;
	directory->mask = slots - 1;
	directory->names = malloc(directory->capacity * sizeof(struct name));
	directory->index = calloc(slots, sizeof(uint32_t));
	directory->homes = calloc(homes ? homes : 1, sizeof(struct home));
	if (!directory->names || !directory->index || !directory->homes) {
		facts_discard(facts, directory);
		return NULL;
	}
	return directory;
}

bool facts_home(struct directory *directory, int root, const char *path, size_t length, uint64_t base)
{
	char *copy = malloc(length + 1);

	if (!copy)
		return false;
	memcpy(copy, path, length);
	copy[length] = '\0';
	directory->homes[directory->home_count++] = (struct home){copy, base, root, -1, 0};
	return true;
}

static bool grow(void **array, uint32_t *capacity, uint32_t wanted, size_t size)
{
	uint32_t larger = *capacity + *capacity / 2 + 8;
	void *moved;

	if (wanted <= *capacity)
		return true;
	if (wanted > UINT32_MAX / 2)
		return false;
	if (larger < wanted)
		larger = wanted;
	moved = realloc(*array, larger * size);
	if (!moved)
		return false;
	*array = moved;
	*capacity = larger;
	return true;
}

static void note(const struct facts *facts, struct directory *directory, uint32_t position)
{
	const struct name *name = &directory->names[position];
	uint32_t at = (uint32_t)hash(facts->hash_key, directory->text + name->text, name->length) & directory->mask;

	while (directory->index[at])
		at = (at + 1) & directory->mask;
	directory->index[at] = position + 1;
}

bool facts_name(struct facts *facts, struct directory *directory, const char *text, size_t length, uint8_t kind,
		uint16_t home, uint64_t real)
{
	if (length > 255 || directory->count > UINT32_MAX / 8)
		return false;
	if (!grow((void **)&directory->names, &directory->capacity, directory->count + 1, sizeof(struct name)) ||
	    !grow((void **)&directory->text, &directory->text_capacity, directory->text_used + (uint32_t)length, 1))
		return false;
	if ((directory->count + 1) * 2 > directory->mask + 1) {
		uint32_t slots = (directory->mask + 1) * 2;
		uint32_t *index = calloc(slots, sizeof(*index));

		if (!index)
			return false;
		free(directory->index);
		directory->index = index;
		directory->mask = slots - 1;
		for (uint32_t at = 0; at < directory->count; at++)
			note(facts, directory, at);
	}
	if (real <= 1 || real > REAL_MAX)
		real = 0;
	if (!real)
		kind = NAME_ASK;
	memcpy(directory->text + directory->text_used, text, length);
	directory->names[directory->count] =
		(struct name){real, directory->text_used, home, (uint8_t)length, kind & 15, kind == NAME_ASK};
	directory->text_used += (uint32_t)length;
	note(facts, directory, directory->count++);
	return true;
}

bool facts_publish(struct facts *facts, struct directory *directory)
{
	facts_forget(facts, directory->id);
	if (!map_put(&facts->directories, directory->id, directory)) {
		facts_discard(facts, directory);
		return false;
	}
	directory->published = directory->count;
	facts->bytes += size_of(directory);
	facts->names += directory->count;
	return true;
}

struct directory *facts_directory(const struct facts *facts, uint64_t id)
{
	return map_get(&facts->directories, id);
}

int64_t facts_find(const struct facts *facts, const struct directory *directory, const char *text, size_t length)
{
	uint32_t at = (uint32_t)hash(facts->hash_key, text, length) & directory->mask;

	for (; directory->index[at]; at = (at + 1) & directory->mask) {
		const struct name *name = &directory->names[directory->index[at] - 1];

		if (name->length == length && !memcmp(directory->text + name->text, text, length))
			return directory->index[at] - 1;
	}
	return -1;
}

/* Above the offsets of all names that came after their directory was published. */
#define LATER_OFFSET (UINT64_C(1) << 29)

uint64_t facts_offset(const struct directory *directory, uint32_t position)
{
	/* There are never 2^29 names (facts_name), and 31 bits are good for any program. */
	if (position >= directory->published)
		return LATER_OFFSET - position + DOTS;
	return (directory->names[position].first ? LATER_OFFSET : LATER_OFFSET * 2) + position + DOTS + 1;
}

bool facts_retract(struct facts *facts, struct directory *directory, const char *text, size_t length)
{
	int64_t found = facts_find(facts, directory, text, length);
	size_t before = size_of(directory);

	directory->changes++;
	if (found >= 0) {
		directory->names[found].kind = NAME_ASK;
		return true;
	}
	if (!directory->known && directory->count - directory->published > NEW_NAMES_MAX)
		return false;
	if (!facts_name(facts, directory, text, length, NAME_ASK, 0, 0))
		return false;
	facts->bytes += size_of(directory) - before;
	facts->names++;
	return true;
}

void facts_vanish(const struct facts *facts, struct directory *directory, const char *text, size_t length)
{
	int64_t found = facts_find(facts, directory, text, length);

	if (found >= 0)
		directory->names[found].kind = NAME_GONE;
}

void facts_give_back(struct directory *directory, uint32_t position, uint8_t kind)
{
	if (directory->names[position].real)
		directory->names[position].kind = kind & 15;
}

static bool is_plain(const struct name *name)
{
	return name->kind == NAME_PLAIN || name->kind == NAME_PLAIN_DIRECTORY;
}

/* -- objects -------------------------------------------------------------------------------------------------------- */

static int open_home(struct facts *facts, struct home *home)
{
	struct open_how how = {
		.flags = O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC,
		.resolve = facts->resolve,
	};
	uint32_t place;
	int fd;

	if (!*home->path)
		return home->root;
	if (home->fd >= 0)
		return home->fd;
	fd = (int)syscall(SYS_openat2, home->root, home->path, &how, sizeof(how));
	if (fd < 0)
		return -1;
	place = facts->home_hand;
	facts->home_hand = (place + 1) % facts->home_limit;
	if (facts->open_homes[place])
		close_home(facts, facts->open_homes[place]);
	facts->open_homes[place] = home;
	home->fd = fd;
	home->place = place;
	return fd;
}

/* The working directory is /proc: see layerfs.fdutil.stand_in_proc. */
bool facts_bare(int fd, const char *text)
{
	char path[300];

	snprintf(path, sizeof(path), "self/fd/%d/%s", fd, text);
	return llistxattr(path, NULL, 0) == 0;
}

int facts_place(struct facts *facts, struct directory *directory, uint32_t position, char text[256])
{
	const struct name *name = &directory->names[position];

	memcpy(text, directory->text + name->text, name->length);
	text[name->length] = '\0';
	return open_home(facts, &directory->homes[name->home]);
}

bool facts_stat(struct facts *facts, struct directory *directory, uint32_t position, struct stat *st)
{
	const struct name *name = &directory->names[position];
	char text[256];
	int fd;

	if (!is_plain(name))
		return false;
	fd = facts_place(facts, directory, position, text);
	if (fd < 0 || fstatat(fd, text, st, AT_SYMLINK_NOFOLLOW))
		return false;
	if (st->st_ino != name->real)
		return false;
	if (name->kind == NAME_PLAIN_DIRECTORY) /* a mark might say that it lies elsewhere */
		return S_ISDIR(st->st_mode) && facts_bare(fd, text);
	/* Of several links Python knows how many are seen. */
	return st->st_nlink == 1 && !S_ISDIR(st->st_mode);
}

struct known *facts_known(const struct facts *facts, const struct directory *directory, uint32_t position)
{
	const struct name *name = &directory->names[position];
	struct known *known;

	if (!is_plain(name))
		return NULL;
	known = map_get(&facts->known, directory->homes[name->home].base | name->real);
	return known && known->directory == directory && known->name == position ? known : NULL;
}

struct known *facts_know(struct facts *facts, struct directory *directory, uint32_t position)
{
	const struct name *name = &directory->names[position];
	uint64_t id = directory->homes[name->home].base | name->real;
	struct known *known = map_get(&facts->known, id);

	if (known)
		return known->directory == directory && known->name == position ? known : NULL;
	if (map_has(&facts->claimed, id))
		return NULL;
	known = malloc(sizeof(*known));
	if (!known)
		return NULL;
	*known = (struct known){directory, id, 0, position};
	if (!map_put(&facts->known, id, known)) {
		free(known);
		return NULL;
	}
	directory->known++;
	return known;
}

static bool drop(struct facts *facts, struct known *known)
{
	struct directory *directory = known->directory;

	map_take(&facts->known, known->id);
	free(known);
	return --directory->known == 0 && directory->let_go;
}

bool facts_unknow(struct facts *facts, struct known *known, uint64_t count)
{
	known->lookups -= count < known->lookups ? count : known->lookups;
	return known->lookups == 0 && drop(facts, known);
}

uint64_t facts_adopt(struct facts *facts, struct directory *directory, uint32_t position)
{
	struct known *known = facts_known(facts, directory, position);
	uint64_t lookups;

	if (is_plain(&directory->names[position]))
		directory->names[position].kind = NAME_ASK;
	if (!known)
		return 0;
	lookups = known->lookups;
	drop(facts, known);
	return lookups;
}
