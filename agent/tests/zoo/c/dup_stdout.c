// Writes reports by redirecting stdout for a moment. Leaks the copy that it restores stdout from.
#include "common.h"

NAMED int redirect_stdout(const char *path)
{
    int saved = check(dup(STDOUT_FILENO), "dup"); // leak
    int file = check(open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600), path);
    check(dup2(file, STDOUT_FILENO), "dup2");
    close(file);
    return saved;
}

NAMED void report_loop(void)
{
    for (unsigned number = 0;; number++) {
        int saved = redirect_stdout("report.txt");
        printf("report %u\n", number);
        fflush(stdout);
        check(dup2(saved, STDOUT_FILENO), "dup2");
        wait_seconds(1);
    }
}

int main(int argc, char **argv)
{
    end_after(argc, argv);
    report_loop();
}
