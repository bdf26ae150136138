// Leaks one kind of thing three times, from one call site: `leaks CASE`. `leaks CASE fixed` takes the same way and
// gives everything back. `leaks list` tells of each case whether it has a fixed form, and what it leaks.
// `// MARK name` names the line of the call.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <sys/mman.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <sys/wait.h>
#include <unistd.h>

// A function that a stack shows by its name: the compiler neither inlines nor copies it.
#define OWN __attribute__((noinline, noclone, noipa))
#define REPEATS 3

// Volatile, so that the loops stay loops with one call site.
static volatile int repeats = REPEATS;
static volatile long sink;
static int fixed;

static inline int check(int result, const char *what)
{
    if (result < 0) {
        perror(what);
        exit(1);
    }
    return result;
}

// For the functions that return an error number.
static inline void check_number(int number, const char *what)
{
    errno = number;
    check(number == 0 ? 0 : -1, what);
}

static int open_null(void)
{
    return check(open("/dev/null", O_RDONLY | O_CLOEXEC), "/dev/null");
}

// Each fd that `make` makes stays, unless the form is the fixed one.
static void leak_fds(int (*make)(int), int given)
{
    int fds[REPEATS];
    for (int i = 0; i < repeats; i++) {
        fds[i] = make(given);
    }
    for (int i = 0; fixed && i < repeats; i++) {
        close(fds[i]);
    }
}

// Fds of which each is made by one call. `given` is what the call needs, and is closed in the end.

OWN static int leak_creat(int given)
{
    (void)given;
    return check(creat("/dev/null", 0600), "creat"); // MARK creat
}

OWN static int leak_open(int given)
{
    (void)given;
    return check(open("/dev/null", O_RDONLY), "open"); // MARK open
}

OWN static int leak_dup(int given)
{
    return check(dup(given), "dup"); // MARK dup
}

OWN static int leak_dup2(int given)
{
    static int number = 100;
    return check(dup2(given, number++), "dup2"); // MARK dup2
}

OWN static int leak_dup3(int given)
{
    static int number = 100;
    return check(dup3(given, number++, O_CLOEXEC), "dup3"); // MARK dup3
}

OWN static int leak_dupfd(int given)
{
    return check(fcntl(given, F_DUPFD, 10), "F_DUPFD"); // MARK dupfd
}

OWN static int leak_dupfd_cloexec(int given)
{
    return check(fcntl(given, F_DUPFD_CLOEXEC, 10), "F_DUPFD_CLOEXEC"); // MARK dupfd_cloexec
}

OWN static int leak_socket4(int given)
{
    (void)given;
    return check(socket(AF_INET, SOCK_STREAM, 0), "socket"); // MARK socket4
}

OWN static int leak_socket6(int given)
{
    (void)given;
    return check(socket(AF_INET6, SOCK_DGRAM, 0), "socket"); // MARK socket6
}

OWN static int leak_socket_unix(int given)
{
    (void)given;
    return check(socket(AF_UNIX, SOCK_STREAM, 0), "socket"); // MARK socket_unix
}

// Of a pair one end stays.
OWN static int leak_socketpair(int given)
{
    int ends[2];
    (void)given;
    check(socketpair(AF_UNIX, SOCK_STREAM, 0, ends), "socketpair"); // MARK socketpair
    close(ends[0]);
    return ends[1];
}

OWN static int leak_pipe(int given)
{
    int ends[2];
    (void)given;
    check(pipe(ends), "pipe"); // MARK pipe
    close(ends[1]);
    return ends[0];
}

OWN static int leak_pipe2(int given)
{
    int ends[2];
    (void)given;
    check(pipe2(ends, O_CLOEXEC | O_NONBLOCK), "pipe2"); // MARK pipe2
    close(ends[0]);
    return ends[1];
}

static int new_listener(void)
{
    int fd = check(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), "socket");
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    check(bind(fd, (struct sockaddr *)&address, sizeof address), "bind");
    check(listen(fd, 16), "listen");
    return fd;
}

static int new_client(int listener)
{
    struct sockaddr_in address;
    socklen_t length = sizeof address;
    int fd = check(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), "socket");
    check(getsockname(listener, (struct sockaddr *)&address, &length), "getsockname");
    check(connect(fd, (struct sockaddr *)&address, length), "connect");
    return fd;
}

OWN static int leak_accept(int listener)
{
    int client = new_client(listener);
    int fd = check(accept(listener, NULL, NULL), "accept"); // MARK accept
    close(client);
    return fd;
}

OWN static int leak_accept4(int listener)
{
    int client = new_client(listener);
    int fd = check(accept4(listener, NULL, NULL, SOCK_CLOEXEC), "accept4"); // MARK accept4
    close(client);
    return fd;
}

// A message of one byte, with room for one fd.
struct message {
    struct msghdr header;
    struct iovec part;
    char byte;
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int))];
};

static struct msghdr *prepare(struct message *message)
{
    memset(message, 0, sizeof *message);
    message->part = (struct iovec){&message->byte, 1};
    message->header.msg_iov = &message->part;
    message->header.msg_iovlen = 1;
    message->header.msg_control = message->control;
    message->header.msg_controllen = sizeof message->control;
    return &message->header;
}

// Sends a file to itself, and closes its own fd of it and that of the sender's end. Returns the receiver's end.
static int send_file(int with_plain_message)
{
    int ends[2];
    struct message message;
    int file = open_null();
    check(socketpair(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0, ends), "socketpair");
    if (with_plain_message) {
        check((int)send(ends[0], "x", 1, 0), "send");
    }
    struct cmsghdr *control = CMSG_FIRSTHDR(prepare(&message));
    control->cmsg_level = SOL_SOCKET;
    control->cmsg_type = SCM_RIGHTS;
    control->cmsg_len = CMSG_LEN(sizeof file);
    memcpy(CMSG_DATA(control), &file, sizeof file);
    check((int)sendmsg(ends[0], &message.header, 0), "sendmsg");
    close(file);
    close(ends[0]);
    return ends[1];
}

static int received_fd(struct msghdr *header)
{
    int fd = -1;
    struct cmsghdr *control = CMSG_FIRSTHDR(header);
    if (control == NULL || control->cmsg_type != SCM_RIGHTS) {
        fputs("no fd came\n", stderr);
        exit(1);
    }
    memcpy(&fd, CMSG_DATA(control), sizeof fd);
    return fd;
}

OWN static int leak_scm_rights(int given)
{
    struct message message;
    int receiver = send_file(0);
    (void)given;
    check((int)recvmsg(receiver, prepare(&message), 0), "recvmsg"); // MARK scm_rights
    close(receiver);
    return received_fd(&message.header);
}

// Of the two messages the second has the fd.
OWN static int leak_scm_rights_mmsg(int given)
{
    struct message messages[2];
    struct mmsghdr both[2] = {{.msg_hdr = *prepare(&messages[0])}, {.msg_hdr = *prepare(&messages[1])}};
    int receiver = send_file(1);
    (void)given;
    check(recvmmsg(receiver, both, 2, 0, NULL), "recvmmsg"); // MARK scm_rights_mmsg
    close(receiver);
    return received_fd(&both[1].msg_hdr);
}

OWN static int leak_eventfd(int given)
{
    (void)given;
    return check(eventfd(0, EFD_CLOEXEC), "eventfd"); // MARK eventfd
}

OWN static int leak_epoll(int given)
{
    (void)given;
    return check(epoll_create1(EPOLL_CLOEXEC), "epoll_create1"); // MARK epoll
}

OWN static int leak_timerfd(int given)
{
    (void)given;
    return check(timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC), "timerfd_create"); // MARK timerfd
}

OWN static int leak_signalfd(int given)
{
    sigset_t none;
    sigemptyset(&none);
    (void)given;
    return check(signalfd(-1, &none, SFD_CLOEXEC), "signalfd"); // MARK signalfd
}

OWN static int leak_inotify(int given)
{
    (void)given;
    return check(inotify_init1(IN_CLOEXEC), "inotify_init1"); // MARK inotify
}

OWN static int leak_memfd(int given)
{
    (void)given;
    return check(memfd_create("leak", MFD_CLOEXEC), "memfd_create"); // MARK memfd
}

// glibc has had a function for it since 2.36.
OWN static int leak_pidfd(int given)
{
    pid_t self = getpid();
    (void)given;
    return check((int)syscall(SYS_pidfd_open, self, 0), "pidfd_open"); // MARK pidfd
}

OWN static int leak_short(int given)
{
    (void)given;
    return check(open("/dev/null", O_RDONLY), "open"); // MARK short
}

OWN static int leak_deep(int given)
{
    (void)given;
    return check(open("/dev/null", O_RDONLY), "open"); // MARK deep
}

OWN static int frame_of_deep(int left)
{
    int fd = left == 0 ? leak_deep(-1) : frame_of_deep(left - 1);
    sink += fd;
    return fd;
}

static int call_deep(int given)
{
    (void)given;
    return frame_of_deep(99);
}

OWN static void storm(void)
{
    for (int i = 0; i < 50000; i++) {
        close(open_null());
    }
}

OWN static int leak_open_storm(int given)
{
    (void)given;
    return check(open("/dev/null", O_RDONLY), "open"); // MARK open_storm
}

static int leak_within_storm(int given)
{
    storm();
    return leak_open_storm(given);
}

static void open_storm(void)
{
    leak_fds(leak_within_storm, -1);
    storm();
}

// Streams, which hold an fd.

OWN static FILE *leak_fopen(void)
{
    FILE *file = fopen("/dev/null", "r"); // MARK fopen
    check(file == NULL ? -1 : 0, "fopen");
    return file;
}

static void fopen_case(void)
{
    FILE *files[REPEATS];
    for (int i = 0; i < repeats; i++) {
        files[i] = leak_fopen();
    }
    for (int i = 0; fixed && i < repeats; i++) {
        fclose(files[i]);
    }
}

OWN static DIR *leak_openat_dir(void)
{
    DIR *folder = opendir("/"); // MARK openat_dir
    check(folder == NULL ? -1 : 0, "opendir");
    return folder;
}

static void openat_dir(void)
{
    DIR *folders[REPEATS];
    for (int i = 0; i < repeats; i++) {
        folders[i] = leak_openat_dir();
    }
    for (int i = 0; fixed && i < repeats; i++) {
        closedir(folders[i]);
    }
}

// What is closed wrongly.

OWN static void leak_double_close(void)
{
    int fd = open_null();
    sink += close(fd); // MARK double_close_first
    if (!fixed) {
        sink += close(fd); // MARK double_close
    }
}

static void double_close(void)
{
    for (int i = 0; i < repeats; i++) {
        leak_double_close();
    }
}

// One thread opens and another one closes. In turns, which the barrier gives.
static pthread_barrier_t turn;
static int shared_fd;
static int opener_closes, other_closes;

OWN static int leak_foreign_close_open(void)
{
    return check(open("/dev/null", O_RDONLY), "open"); // MARK foreign_close_open
}

OWN static void leak_foreign_close_culprit(int fd)
{
    sink += close(fd); // MARK foreign_close_culprit
}

OWN static void leak_foreign_close_victim(int fd)
{
    sink += close(fd); // MARK foreign_close_victim
}

static void *opener(void *unused)
{
    for (int i = 0; i < repeats; i++) {
        shared_fd = leak_foreign_close_open();
        pthread_barrier_wait(&turn);
        pthread_barrier_wait(&turn);
        if (opener_closes) {
            leak_foreign_close_victim(shared_fd);
        }
    }
    return unused;
}

static void *other(void *unused)
{
    for (int i = 0; i < repeats; i++) {
        pthread_barrier_wait(&turn);
        if (other_closes) {
            leak_foreign_close_culprit(shared_fd);
        }
        pthread_barrier_wait(&turn);
    }
    return unused;
}

static void open_and_close_in_threads(void)
{
    pthread_t threads[2];
    check_number(pthread_barrier_init(&turn, NULL, 2), "pthread_barrier_init");
    check_number(pthread_create(&threads[0], NULL, opener, NULL), "pthread_create");
    check_number(pthread_create(&threads[1], NULL, other, NULL), "pthread_create");
    pthread_join(threads[0], NULL);
    pthread_join(threads[1], NULL);
}

static void foreign_close(void)
{
    opener_closes = 1;
    other_closes = !fixed;
    open_and_close_in_threads();
}

// The other thread closes because it is its task.
static void handoff(void)
{
    opener_closes = 0;
    other_closes = 1;
    open_and_close_in_threads();
}

OWN static void close_minus_one(void)
{
    for (int i = 0; i < repeats; i++) {
        sink += close(-1);
    }
}

// Closes all that it may have inherited, as a daemon does. It had opened and closed one of the numbers itself.
OWN static void sweep(void)
{
    close(open_null());
    for (int fd = 3; fd < 1024; fd++) {
        close(fd);
    }
}

// Processes.

static pid_t fork_child(void)
{
    return check(fork(), "fork");
}

// The child must end well.
static void wait_for(pid_t child)
{
    int status;
    check(waitpid(child, &status, 0), "waitpid");
    if (status != 0) {
        fprintf(stderr, "a child ended with status %d\n", status);
        exit(1);
    }
}

static void exec_true(void)
{
    execv("/proc/self/exe", (char *[]){"leaks", "nothing", NULL});
    _exit(1);
}

static void run_true(void)
{
    pid_t child = fork_child();
    if (child == 0) {
        exec_true();
    }
    wait_for(child);
}

OWN static void leak_exec_child(void)
{
    int fd = check(open("/dev/null", O_RDONLY | (fixed ? O_CLOEXEC : 0)), "open"); // MARK exec_child
    run_true();
    close(fd);
}

static void exec_child(void)
{
    for (int i = 0; i < repeats; i++) {
        leak_exec_child();
    }
}

// Hands a file over deliberately: the child clears the flag.
static void exec_deliberate(void)
{
    for (int i = 0; i < repeats; i++) {
        int fd = open_null();
        pid_t child = fork_child();
        if (child == 0) {
            check(fcntl(fd, F_SETFD, 0), "F_SETFD");
            exec_true();
        }
        wait_for(child);
        close(fd);
    }
}

// Hands a file over deliberately: the child puts it where the program expects it, as number 5 and also in the place
// of a file that was there before.
static void exec_dup2(void)
{
    for (int i = 0; i < repeats; i++) {
        int before = open_null();
        int fd = open_null();
        pid_t child = fork_child();
        if (child == 0) {
            check(dup2(fd, 5), "dup2");
            check(dup2(fd, before), "dup2");
            exec_true();
        }
        wait_for(child);
        close(fd);
        close(before);
    }
}

OWN static int leak_child_leak(int given)
{
    (void)given;
    return check(open("/dev/null", O_RDONLY), "open"); // MARK child_leak
}

static void child_leak(void)
{
    pid_t child = fork_child();
    if (child == 0) {
        leak_fds(leak_child_leak, -1);
        _exit(0);
    }
    wait_for(child);
}

OWN static int leak_grandchild_leak(int given)
{
    (void)given;
    return check(open("/dev/null", O_RDONLY), "open"); // MARK grandchild_leak
}

static void grandchild_leak(void)
{
    pid_t child = fork_child();
    if (child == 0) {
        pid_t grandchild = fork_child();
        if (grandchild == 0) {
            leak_fds(leak_grandchild_leak, -1);
            _exit(0);
        }
        wait_for(grandchild);
        _exit(0);
    }
    wait_for(child);
}

OWN static pid_t leak_zombie(void)
{
    pid_t child = check(fork(), "fork"); // MARK zombie
    if (child == 0) {
        _exit(0);
    }
    return child;
}

static void zombie(void)
{
    for (int i = 0; i < repeats; i++) {
        siginfo_t info;
        pid_t child = leak_zombie();
        // It has ended and is still there.
        check(waitid(P_PID, (id_t)child, &info, WEXITED | WNOWAIT), "waitid");
        if (fixed) {
            wait_for(child);
        }
    }
}

OWN static pid_t leak_vfork_zombie(void)
{
    pid_t child = vfork(); // MARK vfork_zombie
    if (child == 0) {
        _exit(0);
    }
    return check(child, "vfork");
}

static void vfork_zombie(void)
{
    for (int i = 0; i < repeats; i++) {
        siginfo_t info;
        pid_t child = leak_vfork_zombie();
        // vfork returns a little earlier.
        check(waitid(P_PID, (id_t)child, &info, WEXITED | WNOWAIT), "waitid");
        if (fixed) {
            wait_for(child);
        }
    }
}

// The children close what whoever reads the output would wait for.
OWN static pid_t leak_orphan(void)
{
    pid_t child = check(fork(), "fork"); // MARK orphan
    if (child == 0) {
        close(0);
        close(1);
        close(2);
        sleep(2);
        _exit(0);
    }
    return child;
}

static void orphan(void)
{
    pid_t children[REPEATS];
    for (int i = 0; i < repeats; i++) {
        children[i] = leak_orphan();
    }
    for (int i = 0; fixed && i < repeats; i++) {
        kill(children[i], SIGKILL);
        check(waitpid(children[i], NULL, 0), "waitpid");
    }
}

// Threads.

static _Atomic pid_t ids[REPEATS];
static _Atomic int started;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static int told_to_end;

static void has_started(void)
{
    ids[started++] = gettid();
}

// Until all have started and, very likely, wait.
static void wait_until_started(int threads)
{
    for (int i = 0; i < threads; i++) {
        while (ids[i] == 0) {
            usleep(1000);
        }
    }
    usleep(5000);
}

// Until the kernel has no such threads any more.
static void wait_until_gone(void)
{
    for (int i = 0; i < repeats; i++) {
        while (ids[i] == 0 || syscall(SYS_tgkill, getpid(), ids[i], 0) == 0) {
            usleep(1000);
        }
    }
}

OWN static void *wait_until_told(void *unused)
{
    has_started();
    pthread_mutex_lock(&mutex);
    while (!told_to_end) {
        pthread_cond_wait(&changed, &mutex);
    }
    pthread_mutex_unlock(&mutex);
    return unused;
}

static void tell_to_end(void)
{
    pthread_mutex_lock(&mutex);
    told_to_end = 1;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&mutex);
}

OWN static pthread_t leak_thread_unjoined(void)
{
    pthread_t thread;
    check_number(pthread_create(&thread, NULL, wait_until_told, NULL), "pthread_create"); // MARK thread_unjoined
    return thread;
}

static void thread_unjoined(void)
{
    pthread_t threads[REPEATS];
    for (int i = 0; i < repeats; i++) {
        threads[i] = leak_thread_unjoined();
    }
    wait_until_started(REPEATS);
    if (fixed) {
        tell_to_end();
    }
    for (int i = 0; fixed && i < repeats; i++) {
        check_number(pthread_join(threads[i], NULL), "pthread_join");
    }
}

static void *finish(void *unused)
{
    has_started();
    return unused;
}

OWN static pthread_t leak_thread_finished_unjoined(void)
{
    pthread_t thread;
    check_number(pthread_create(&thread, NULL, finish, NULL), "pthread_create"); // MARK thread_finished_unjoined
    return thread;
}

static void thread_finished_unjoined(void)
{
    pthread_t threads[REPEATS];
    for (int i = 0; i < repeats; i++) {
        threads[i] = leak_thread_finished_unjoined();
    }
    wait_until_gone();
    for (int i = 0; fixed && i < repeats; i++) {
        check_number(pthread_join(threads[i], NULL), "pthread_join");
    }
}

// Both ends of a pipe in one fd: who reads from it waits.
static int both_ends(void)
{
    int ends[2];
    char path[32];
    check(pipe2(ends, O_CLOEXEC), "pipe2");
    snprintf(path, sizeof path, "/proc/self/fd/%d", ends[0]);
    int fd = check(open(path, O_RDWR | O_CLOEXEC), path);
    close(ends[0]);
    close(ends[1]);
    return fd;
}

OWN static void *wait_for_byte(void *pipe)
{
    char byte;
    has_started();
    check((int)read(*(int *)pipe, &byte, 1), "read");
    return pipe;
}

OWN static void leak_thread_detached(int *pipe)
{
    pthread_t thread;
    check_number(pthread_create(&thread, NULL, wait_for_byte, pipe), "pthread_create"); // MARK thread_detached
    pthread_detach(thread);
}

// The pipe stays as long as the threads.
static void thread_detached(void)
{
    static int pipe;
    pipe = both_ends();
    for (int i = 0; i < repeats; i++) {
        leak_thread_detached(&pipe);
    }
    wait_until_started(REPEATS);
    if (fixed) {
        check((int)write(pipe, "end", REPEATS), "write");
        wait_until_gone();
        close(pipe);
    }
}

OWN static int leak_thread_leaks_fd(int given)
{
    (void)given;
    return check(open("/dev/null", O_RDONLY), "open"); // MARK thread_leaks_fd
}

static void *leak_in_thread(void *unused)
{
    leak_fds(leak_thread_leaks_fd, -1);
    return unused;
}

static void thread_leaks_fd(void)
{
    pthread_t thread;
    check_number(pthread_create(&thread, NULL, leak_in_thread, NULL), "pthread_create");
    pthread_join(thread, NULL);
}

// One line that is reached on three ways, by recursion too.

OWN static int leak_on_ways(void)
{
    return check(open("/dev/null", O_RDONLY | O_CLOEXEC), "open"); // MARK ways
}

OWN static int first_way(void)
{
    return leak_on_ways() + (int)sink;
}

OWN static int second_way(int depth)
{
    return (depth > 0 ? second_way(depth - 1) : leak_on_ways()) + (int)sink;
}

static void ways(void)
{
    int fds[] = {first_way(), second_way(0), second_way(3)};
    for (int i = 0; fixed && i < 3; i++) {
        close(fds[i]);
    }
}

// One file and one thread, for as long as the program runs.

OWN static int keep_file(void)
{
    return check(open("/dev/null", O_RDONLY | O_CLOEXEC), "open"); // MARK once
}

OWN static pthread_t keep_thread(void)
{
    pthread_t thread;
    check_number(pthread_create(&thread, NULL, wait_until_told, NULL), "pthread_create"); // MARK once_thread
    return thread;
}

static void once(void)
{
    int fd = keep_file();
    pthread_t thread = keep_thread();
    wait_until_started(1);
    if (fixed) {
        tell_to_end();
        check_number(pthread_join(thread, NULL), "pthread_join");
        close(fd);
    }
}

// More at a time than anybody can read: 8 times 10,000 files, of which 80 stay, once a line has come.

OWN static int leak_crowd(void)
{
    return check(open("/dev/null", O_RDONLY), "open"); // MARK crowd
}

static void *open_many(void *unused)
{
    for (int i = 0; i < 10000; i++) {
        int fd = leak_crowd();
        if (fixed || i % 1000 != 7) {
            close(fd);
        }
    }
    return unused;
}

static int crowd(void)
{
    pthread_t threads[8];
    printf("%d\n", getpid());
    fflush(stdout);
    check(getchar() == '\n' ? 0 : -1, "a line");
    for (int i = 0; i < 8; i++) {
        check_number(pthread_create(&threads[i], NULL, open_many, NULL), "pthread_create");
    }
    for (int i = 0; i < 8; i++) {
        pthread_join(threads[i], NULL);
    }
    return 0;
}

static const struct leak {
    const char *name;
    int has_fixed;
    const char *kind;
    // One of the two: makes one fd, perhaps from a given one, or does all.
    int (*make)(int);
    void (*all)(void);
    int (*given)(void);
} leaks[] = {
    {"creat", 1, "fd", .make = leak_creat},
    {"open", 1, "fd", .make = leak_open},
    {"dup", 1, "fd", .make = leak_dup, .given = open_null},
    {"dup2", 1, "fd", .make = leak_dup2, .given = open_null},
    {"dup3", 1, "fd", .make = leak_dup3, .given = open_null},
    {"dupfd", 1, "fd", .make = leak_dupfd, .given = open_null},
    {"dupfd_cloexec", 1, "fd", .make = leak_dupfd_cloexec, .given = open_null},
    {"socket4", 1, "fd", .make = leak_socket4},
    {"socket6", 1, "fd", .make = leak_socket6},
    {"socket_unix", 1, "fd", .make = leak_socket_unix},
    {"socketpair", 1, "fd", .make = leak_socketpair},
    {"pipe", 1, "fd", .make = leak_pipe},
    {"pipe2", 1, "fd", .make = leak_pipe2},
    {"accept", 1, "fd", .make = leak_accept, .given = new_listener},
    {"accept4", 1, "fd", .make = leak_accept4, .given = new_listener},
    {"scm_rights", 1, "fd", .make = leak_scm_rights},
    {"scm_rights_mmsg", 1, "fd", .make = leak_scm_rights_mmsg},
    {"eventfd", 1, "fd", .make = leak_eventfd},
    {"epoll", 1, "fd", .make = leak_epoll},
    {"timerfd", 1, "fd", .make = leak_timerfd},
    {"signalfd", 1, "fd", .make = leak_signalfd},
    {"inotify", 1, "fd", .make = leak_inotify},
    {"memfd", 1, "fd", .make = leak_memfd},
    {"pidfd", 1, "fd", .make = leak_pidfd},
    {"openat_dir", 1, "fd", .all = openat_dir},
    {"fopen", 1, "fd", .all = fopen_case},
    {"short", 1, "fd", .make = leak_short},
    {"deep", 1, "fd", .make = call_deep},
    {"open_storm", 1, "fd", .all = open_storm},
    {"thread_leaks_fd", 1, "fd", .all = thread_leaks_fd},
    {"child_leak", 1, "fd", .all = child_leak},
    {"grandchild_leak", 1, "fd", .all = grandchild_leak},
    {"exec_child", 1, "exec_fd", .all = exec_child},
    {"double_close", 1, "double_close", .all = double_close},
    {"foreign_close", 1, "foreign_close", .all = foreign_close},
    {"thread_unjoined", 1, "thread", .all = thread_unjoined},
    {"thread_detached", 1, "thread", .all = thread_detached},
    {"thread_finished_unjoined", 1, "finished_thread", .all = thread_finished_unjoined},
    {"zombie", 1, "zombie", .all = zombie},
    {"vfork_zombie", 1, "zombie", .all = vfork_zombie},
    {"orphan", 1, "orphan", .all = orphan},
    {"exec_deliberate", 0, "clean", .all = exec_deliberate},
    {"exec_dup2", 0, "clean", .all = exec_dup2},
    {"handoff", 0, "clean", .all = handoff},
    {"sweep", 0, "clean", .all = sweep},
    {"close_minus_one", 0, "clean", .all = close_minus_one},
    {"ways", 1, "fd", .all = ways},
    {"once", 1, "clean", .all = once},
};

#define LEAKS (sizeof leaks / sizeof *leaks)

// A kernel may be without IPv6.
static int is_possible(const struct leak *leak)
{
    if (leak->make != leak_socket6) {
        return 1;
    }
    int fd = socket(AF_INET6, SOCK_DGRAM, 0);
    if (fd >= 0) {
        close(fd);
    }
    return fd >= 0;
}

static int list(void)
{
    for (size_t i = 0; i < LEAKS; i++) {
        if (is_possible(&leaks[i])) {
            printf("%s %d %s\n", leaks[i].name, leaks[i].has_fixed, leaks[i].kind);
        }
    }
    return 0;
}

static int run(const struct leak *leak)
{
    if (leak->all != NULL) {
        leak->all();
        return 0;
    }
    int given = leak->given == NULL ? -1 : leak->given();
    leak_fds(leak->make, given);
    if (given >= 0) {
        close(given);
    }
    return 0;
}

int main(int argc, char **argv)
{
    fixed = argc == 3 && strcmp(argv[2], "fixed") == 0;
    if (argc == 2 && strcmp(argv[1], "nothing") == 0) {
        return 0;
    }
    if (argc == 2 && strcmp(argv[1], "list") == 0) {
        return list();
    }
    if (argc == 2 + fixed && strcmp(argv[1], "crowd") == 0) {
        return crowd();
    }
    for (size_t i = 0; argc == 2 + fixed && i < LEAKS; i++) {
        if (strcmp(argv[1], leaks[i].name) == 0 && leaks[i].has_fixed >= fixed) {
            return run(&leaks[i]);
        }
    }
    fprintf(stderr, "usage: %s list | CASE [fixed]\n", argv[0]);
    return 2;
}
