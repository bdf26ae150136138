/* Lives for a moment, in three images: its own, that of a child that only copies it, and that of a child which execs.
   With `wait` it stays in the same state until stdin ends. */
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

int main(int argc, char **argv) {
    char byte;
    if (argc > 1 && strcmp(argv[1], "wait") == 0)
        return write(1, "ready\n", 6) != 6 || read(0, &byte, 1) != 0;
    if (argc > 1)
        return 0;
    if (fork() == 0)
        _exit(0);
    pid_t child = fork();
    if (child == 0) {
        execl(argv[0], argv[0], "again", (char *)0);
        _exit(1);
    }
    while (wait(0) > 0) {
    }
    return 0;
}
