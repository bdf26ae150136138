// Makes the runtime start a thread in each round: it lacks one when a goroutine keeps its own for ever.
package main

import (
	"os"
	"runtime"
	"strconv"
	"syscall"
	"time"
)

func main() {
	rounds, _ := strconv.Atoi(os.Args[1])
	for round := 0; round < rounds; round++ {
		// Tells the tracer what comes next.
		syscall.RawSyscall6(syscall.SYS_PRCTL, 0x706c756d, 0, 0, 0, 0, 0)
		go func() {
			runtime.LockOSThread()
			select {}
		}()
		time.Sleep(5 * time.Millisecond)
	}
}
