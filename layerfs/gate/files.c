#define _GNU_SOURCE
#include "core.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
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

/* -- readers: what is not in the page cache takes the disk's time --------------------------------------------------- */

#define READERS 4

struct job {
	struct job *next;
	uint64_t unique, offset;
	uint32_t size;
	int device, fd;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t some = PTHREAD_COND_INITIALIZER;
static struct job *first, **last = &first;
static int threads, idle;

/* Reads, and replies. */
static void carry_out(const struct job *job)
{
	char *data = malloc(job->size ? job->size : 1);
	size_t done = 0;
	ssize_t got = 0;

	if (!data) {
		gate_reply(job->device, job->unique, ENOMEM, NULL, 0);
		return;
	}
	while (done < job->size) {
		got = pread(job->fd, data + done, job->size - done, (off_t)(job->offset + done));
		if (got < 0 && errno == EINTR)
			continue;
		if (got <= 0)
			break;
		done += (size_t)got;
	}
	/* An error after some bytes is told by the read that begins there. */
	if (got < 0 && !done)
		gate_reply(job->device, job->unique, errno, NULL, 0);
	else
		gate_reply(job->device, job->unique, 0, data, done);
	free(data);
}

static void *reader(void *nothing)
{
	(void)nothing;
	for (;;) {
		struct job *job;

		pthread_mutex_lock(&lock);
		idle++;
		while (!first)
			pthread_cond_wait(&some, &lock);
		idle--;
		job = first;
		first = job->next;
		if (!first)
			last = &first;
		pthread_mutex_unlock(&lock);
		carry_out(job);
		close(job->fd);
		free(job);
	}
	return NULL;
}

static bool start_reader(void)
{
	sigset_t all, before;
	pthread_t thread;
	int error;

	/* Signals are Python's main thread's. */
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	error = pthread_create(&thread, NULL, reader, NULL);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (!error)
		pthread_detach(thread);
	return !error;
}

/* The descriptor may be closed, and its number mean another file, before a thread comes to it. */
static bool give_to_reader(const struct job *what)
{
	struct job *job = malloc(sizeof(*job));
	bool enough = false;

	if (!job)
		return false;
	*job = *what;
	job->fd = fcntl(what->fd, F_DUPFD_CLOEXEC, 3);
	if (job->fd >= 0) {
		pthread_mutex_lock(&lock);
		if (idle == 0 && threads < READERS && start_reader())
			threads++;
		enough = threads > 0;
		if (enough) {
			*last = job;
			last = &job->next;
			pthread_cond_signal(&some);
		}
		pthread_mutex_unlock(&lock);
	}
	if (!enough) {
		if (job->fd >= 0)
			close(job->fd);
		free(job);
	}
	return enough;
}

void reader_read(int device, uint64_t unique, int fd, uint64_t offset, uint32_t size)
{
	const struct job job = {NULL, unique, offset, size, device, fd};

	if (!give_to_reader(&job))
		carry_out(&job);
}
