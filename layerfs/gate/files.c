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

uint64_t files_add(struct files *files, uint64_t node, int fd)
{
	uint32_t at;

	if (files->open >= files->limit)
		return 0;
	if (files->vacancies) {
		at = files->vacant[--files->vacancies];
	} else {
		if (files->count == files->capacity) {
			uint32_t larger = files->capacity * 2 + 16;
			struct file *table = realloc(files->table, larger * sizeof(*table));
			uint32_t *vacant;

			if (!table)
				return 0;
			files->table = table;
			vacant = realloc(files->vacant, larger * sizeof(*vacant));
			if (!vacant)
				return 0;
			files->vacant = vacant;
			files->capacity = larger;
		}
		at = files->count++;
	}
	files->table[at] = (struct file){node, fd};
	files->open++;
	return NATIVE_HANDLE | at;
}

struct file *files_get(struct files *files, uint64_t handle)
{
	uint64_t at = handle & ~NATIVE_HANDLE;

	if (!(handle & NATIVE_HANDLE) || at >= files->count || files->table[at].fd < 0)
		return NULL;
	return &files->table[at];
}

void files_close(struct files *files, uint64_t handle)
{
	struct file *file = files_get(files, handle);

	if (!file)
		return;
	close(file->fd);
	file->fd = -1;
	files->vacant[files->vacancies++] = (uint32_t)(handle & ~NATIVE_HANDLE);
	files->open--;
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

void files_free(struct files *files)
{
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

bool reader_read(int device, uint64_t unique, int fd, uint64_t offset, uint32_t size)
{
	struct job *job = malloc(sizeof(*job));
	bool enough;

	if (!job)
		return false;
	*job = (struct job){NULL, unique, offset, size, device, fd};
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
	if (!enough)
		free(job);
	return enough;
}
