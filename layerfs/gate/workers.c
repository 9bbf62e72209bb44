#define _GNU_SOURCE
#include "core.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Writes may wait for the disk (the kernel throttles who makes pages dirty too fast), so some threads are left to reads. */
#define WORKERS 8
#define WRITES 4

struct job {
	struct job *next;
	uint64_t unique, offset;
	char *data; /* what to write; NULL: a read */
	uint32_t size;
	int device, fd;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t some = PTHREAD_COND_INITIALIZER, fewer_writes = PTHREAD_COND_INITIALIZER;
static struct job *first, **last = &first;
static unsigned workers, idle, writes;

/* Reads, and replies. */
static void read_and_reply(const struct job *job)
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

/* Writes, and replies. What goes wrong after some bytes is told by the short count, and by the write that goes on there. */
static void write_and_reply(const struct job *job)
{
	struct fuse_write_out out = {0};
	ssize_t done = 0;

	while (out.size < job->size) {
		done = pwrite(job->fd, job->data + out.size, job->size - out.size, (off_t)(job->offset + out.size));
		if (done < 0 && errno == EINTR)
			continue;
		if (done <= 0)
			break;
		out.size += (uint32_t)done;
	}
	if (done < 0 && !out.size)
		gate_reply(job->device, job->unique, errno, NULL, 0);
	else
		gate_reply(job->device, job->unique, 0, &out, sizeof(out));
}

static bool begin_write(void)
{
	bool may;

	pthread_mutex_lock(&lock);
	may = writes < WRITES;
	writes += may;
	pthread_mutex_unlock(&lock);
	return may;
}

static void end_write(void)
{
	pthread_mutex_lock(&lock);
	writes--;
	pthread_cond_broadcast(&fewer_writes);
	pthread_mutex_unlock(&lock);
}

static void carry_out(struct job *job)
{
	if (!job->data) {
		read_and_reply(job);
		return;
	}
	write_and_reply(job);
	end_write();
}

static void discard(struct job *job)
{
	if (job->fd >= 0)
		close(job->fd);
	free(job->data);
	free(job);
}

static void *work(void *nothing)
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
		discard(job);
	}
	return NULL;
}

static bool start_worker(void)
{
	sigset_t all, before;
	pthread_t thread;
	int error;

	/* Signals are Python's main thread's. */
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	error = pthread_create(&thread, NULL, work, NULL);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (!error)
		pthread_detach(thread);
	return !error;
}

/* `what` with a descriptor of its own: the other may be closed, and its number mean another file, before a thread comes to it. */
static struct job *prepare(const struct job *what)
{
	struct job *job = malloc(sizeof(*job));

	if (!job)
		return NULL;
	*job = *what;
	job->fd = fcntl(what->fd, F_DUPFD_CLOEXEC, 3);
	if (job->fd >= 0)
		return job;
	free(job);
	return NULL;
}

/* With `lock`. False: there is no thread, and it stays the caller's. */
static bool enqueue(struct job *job)
{
	if (idle == 0 && workers < WORKERS && start_worker())
		workers++;
	if (!workers)
		return false;
	*last = job;
	last = &job->next;
	pthread_cond_signal(&some);
	return true;
}

void worker_read(int device, uint64_t unique, int fd, uint64_t offset, uint32_t size)
{
	const struct job here = {NULL, unique, offset, NULL, size, device, fd};
	struct job *job = prepare(&here);
	bool taken = false;

	if (job) {
		pthread_mutex_lock(&lock);
		taken = enqueue(job);
		pthread_mutex_unlock(&lock);
	}
	if (taken)
		return;
	read_and_reply(&here);
	if (job)
		discard(job);
}

bool worker_write(int device, uint64_t unique, int fd, uint64_t offset, const void *data, uint32_t size)
{
	struct job *job;
	bool taken = false;

	if (!begin_write())
		return false;
	job = prepare(&(const struct job){NULL, unique, offset, NULL, size, device, fd});
	if (job && (job->data = malloc(size))) {
		memcpy(job->data, data, size);
		pthread_mutex_lock(&lock);
		taken = enqueue(job);
		pthread_mutex_unlock(&lock);
	}
	if (taken)
		return true;
	if (job)
		discard(job);
	end_write();
	return false;
}

void workers_settle(void)
{
	pthread_mutex_lock(&lock);
	while (writes)
		pthread_cond_wait(&fewer_writes, &lock);
	pthread_mutex_unlock(&lock);
}
