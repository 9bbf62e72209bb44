#define _GNU_SOURCE
#include "core.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* -- files opened here ---------------------------------------------------------------------------------------------- */

/* Position of a free place in the table, or -1 without memory. */
static int64_t place_for(struct files *files, uint64_t node, int fd)
{
	uint32_t at;

	if (files->vacancies) {
		at = files->vacant[--files->vacancies];
	} else {
		if (files->count == files->capacity) {
			uint32_t larger = files->capacity * 2 + 16;
			struct file *table = realloc(files->table, larger * sizeof(*table));
			uint32_t *vacant;

			if (!table)
				return -1;
			files->table = table;
			vacant = realloc(files->vacant, larger * sizeof(*vacant));
			if (!vacant)
				return -1;
			files->vacant = vacant;
			files->capacity = larger;
		}
		at = files->count++;
	}
	files->table[at] = (struct file){node, fd, false, true};
	files->open++;
	return at;
}

static void close_at(struct files *files, uint32_t at)
{
	close(files->table[at].fd);
	files->table[at].fd = -1;
	files->vacant[files->vacancies++] = at;
	files->open--;
}

uint64_t files_add(struct files *files, uint64_t node, int fd)
{
	int64_t at = files->open < files->limit ? place_for(files, node, fd) : -1;

	return at < 0 ? 0 : NATIVE_HANDLE | (uint64_t)at;
}

struct file *files_get(struct files *files, uint64_t handle)
{
	uint64_t at = handle & ~NATIVE_HANDLE;

	if (!(handle & NATIVE_HANDLE) || at >= files->count || files->table[at].fd < 0 || files->table[at].kept)
		return NULL;
	return &files->table[at];
}

void files_close(struct files *files, uint64_t handle)
{
	struct file *file = files_get(files, handle);

	if (file)
		close_at(files, (uint32_t)(handle & ~NATIVE_HANDLE));
}

int files_switch(struct files *files, uint64_t node, int fd)
{
	int count = 0;

	for (uint32_t at = 0; files->open && at < files->count; at++) {
		if (files->table[at].fd < 0 || files->table[at].node != node)
			continue;
		/* The number stays: a reader's thread may be about to use it. */
		if (dup3(fd, files->table[at].fd, O_CLOEXEC) < 0)
			return -1;
		count++;
	}
	return count;
}

/* -- kept ----------------------------------------------------------------------------------------------------------- */

bool files_keep(struct files *files, uint64_t node, int fd)
{
	int64_t at;

	/* Twice round: the first time all of them may have been used. */
	for (uint32_t left = 2 * files->count; files->open >= files->limit && left; left--) {
		struct file *file;

		files->hand = files->hand + 1 < files->count ? files->hand + 1 : 0;
		file = &files->table[files->hand];
		if (file->fd < 0)
			continue;
		if (!file->used)
			files_drop(files, file->node);
		else
			file->used = false;
	}
	at = place_for(files, node, fd);
	if (at < 0)
		return false;
	files->table[at].kept = true;
	if (map_put(&files->kept, node, (void *)(uintptr_t)(at + 1)))
		return true;
	/* `fd` stays the caller's. */
	files->table[at].fd = -1;
	files->vacant[files->vacancies++] = (uint32_t)at;
	files->open--;
	return false;
}

int files_kept(struct files *files, uint64_t node)
{
	uintptr_t at = (uintptr_t)map_get(&files->kept, node);

	if (!at)
		return -1;
	files->table[at - 1].used = true;
	return files->table[at - 1].fd;
}

void files_drop(struct files *files, uint64_t node)
{
	uintptr_t at = (uintptr_t)map_take(&files->kept, node);

	if (at)
		close_at(files, (uint32_t)(at - 1));
}

void files_free(struct files *files)
{
	map_free(&files->kept);
	for (uint32_t at = 0; at < files->count; at++)
		if (files->table[at].fd >= 0)
			close(files->table[at].fd);
	free(files->table);
	free(files->vacant);
	memset(files, 0, sizeof(*files));
}
