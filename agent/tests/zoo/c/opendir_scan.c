// Looks for a file in a folder. Leaks the folder when it has found the file.
#include "common.h"
#include <dirent.h>

NAMED int find_file(const char *folder, const char *name)
{
    DIR *entries = opendir(folder); // leak
    if (entries == NULL) {
        return 0;
    }
    for (struct dirent *entry; (entry = readdir(entries)) != NULL;) {
        if (strcmp(entry->d_name, name) == 0) {
            return 1;
        }
    }
    closedir(entries);
    return 0;
}

NAMED void scan_loop(void)
{
    for (;;) {
        if (!find_file("/etc", "no such file") && find_file("/etc", "hostname")) {
            puts("/etc/hostname is there");
        }
        wait_seconds(1);
    }
}

int main(int argc, char **argv)
{
    end_after(argc, argv);
    scan_loop();
}
