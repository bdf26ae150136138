// A shared library of C++ that opens a file for its caller.
#include <fcntl.h>
#include <fstream>
#include <vector>

namespace pool {

template <typename T> class Pool {
  public:
    __attribute__((noinline)) T acquire(const char *path);
    std::vector<T> held;
};

template <typename T> T Pool<T>::acquire(const char *path) {
    T fd = open(path, O_RDONLY); // MARK acquire
    held.push_back(fd);
    return fd;
}

Pool<int> all;
volatile long sink;

} // namespace pool

__attribute__((noinline)) int get(const char *path) {
    int fd = pool::all.acquire(path); // MARK get
    pool::sink = fd;
    return fd;
}

__attribute__((noinline)) long stream(const char *path) {
    std::ifstream file(path); // MARK stream
    return file.tellg();
}
