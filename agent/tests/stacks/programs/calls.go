// Makes fds, each from a function of its own. `MARK name` names the line of the call. With a second argument each
// round waits for a byte on stdin, and the end of that is its end.
package main

import (
	"os"
	"runtime"
	"strconv"
	"syscall"
)

// Tells the tracer what comes next.
//
//go:noinline
func phase(number int) {
	syscall.RawSyscall6(syscall.SYS_PRCTL, 0x706c756d, uintptr(number), 0, 0, 0, 0)
}

var (
	listener int
	address  *syscall.SockaddrInet4
)

//go:noinline
func callOpen() int {
	file, err := os.Open("/etc/hostname") // MARK open
	if err != nil {
		panic(err)
	}
	fd, _ := syscall.Dup(int(file.Fd()))
	file.Close()
	return fd
}

//go:noinline
func callSocket() int {
	fd, _ := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0) // MARK socket
	return fd
}

//go:noinline
func callAccept() int {
	fd, _, _ := syscall.Accept(listener) // MARK accept
	return fd
}

//go:noinline
func callPipe() int {
	fds := make([]int, 2)
	syscall.Pipe2(fds, 0) // MARK pipe
	syscall.Close(fds[1])
	return fds[0]
}

// Inlined into its caller.
func inlined() int {
	fd, _ := syscall.Dup(0) // MARK inlined
	return fd
}

//go:noinline
func callDup() int {
	fd := inlined() // MARK dup
	return fd + phaseless
}

var phaseless int

//go:noinline
func callEventfd() int {
	fd, _, _ := syscall.Syscall(syscall.SYS_EVENTFD2, 0, 0, 0) // MARK eventfd
	return int(fd)
}

//go:noinline
func callEpollCreate() int {
	fd, _ := syscall.EpollCreate1(0) // MARK epoll_create
	return fd
}

var calls = []func() int{callOpen, callSocket, callAccept, callPipe, callDup, callEventfd, callEpollCreate}

//go:noinline
func once(number int) {
	client := -1
	if number == 2 {
		client, _ = syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
		syscall.Connect(client, address)
	}
	phase(number)
	fd := calls[number]() // MARK once
	phase(-1)
	syscall.Close(fd)
	syscall.Close(client)
}

func main() {
	runtime.LockOSThread()
	rounds, _ := strconv.Atoi(os.Args[1])
	listener, _ = syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
	syscall.Bind(listener, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}})
	syscall.Listen(listener, 16)
	name, _ := syscall.Getsockname(listener)
	address = name.(*syscall.SockaddrInet4)
	paced := len(os.Args) > 2
	if paced {
		// The first file makes fds of the runtime's own.
		syscall.Close(callOpen())
	}
	for round := 0; round < rounds; round++ {
		if paced {
			if read, _ := syscall.Read(0, make([]byte, 1)); read != 1 {
				break
			}
		}
		for number := range calls {
			once(number) // MARK main
		}
	}
}
