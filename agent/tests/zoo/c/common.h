// What the C and C++ programs share: how they end, how they wait, and a loopback to talk over.
#pragma once
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

// A function that a stack shows by its name: the compiler neither inlines nor copies it.
#define NAMED __attribute__((noipa))

// The process ends after the seconds of its first argument.
static inline void end_after(int argc, char **argv)
{
    if (argc < 2) {
        fprintf(stderr, "usage: %s SECONDS\n", argv[0]);
        exit(2);
    }
    alarm((unsigned)atoi(argv[1]));
}

static inline int check(int result, const char *what)
{
    if (result < 0) {
        perror(what);
        exit(1);
    }
    return result;
}

static inline void wait_seconds(double seconds)
{
    struct timespec left;
    left.tv_sec = (time_t)seconds;
    left.tv_nsec = (long)((seconds - (double)left.tv_sec) * 1e9);
    while (nanosleep(&left, &left) < 0 && errno == EINTR) {
    }
}

// Uniform between 0 and 1.
static inline double uniform(void)
{
    return (double)rand() / ((double)RAND_MAX + 1);
}

static inline int open_file(const char *path)
{
    return check(open(path, O_RDONLY | O_CLOEXEC), path); // leak
}

// fork; the child ends with this process at the latest.
static inline pid_t fork_child(void)
{
    pid_t parent = getpid();
    pid_t child = check(fork(), "fork");
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() != parent) {
            _exit(1);
        }
    }
    return child;
}

// A socket bound to a free port of the loopback, and its address.
static inline int bound_socket(struct sockaddr_in *address)
{
    int fd = check(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), "socket");
    socklen_t length = sizeof *address;
    memset(address, 0, sizeof *address);
    address->sin_family = AF_INET;
    address->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    check(bind(fd, (struct sockaddr *)address, length), "bind");
    check(getsockname(fd, (struct sockaddr *)address, &length), "getsockname");
    return fd;
}

static inline int listening_socket(struct sockaddr_in *address)
{
    int fd = bound_socket(address);
    check(listen(fd, 128), "listen");
    return fd;
}

static inline int connected_socket(const struct sockaddr_in *address)
{
    int fd = check(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), "socket");
    check(connect(fd, (const struct sockaddr *)address, sizeof *address), "connect");
    return fd;
}

// A detached thread.
static inline void start_thread(void *(*body)(void *), void *argument)
{
    pthread_t thread;
    int failed = pthread_create(&thread, NULL, body, argument); // leak
    if (failed != 0) {
        fprintf(stderr, "pthread_create: %s\n", strerror(failed));
        exit(1);
    }
    pthread_detach(thread);
}
