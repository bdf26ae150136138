// Starts workers with an OS thread each, 115 within 40 s, then replaces the oldest, two a second.
package main

import (
	"runtime"
	"time"
)

// With the threads of the runtime they are a little more than 120.
const (
	workers = 115
	growth  = 40 * time.Second
)

// work ends with its thread: the goroutine is still locked to it.
func work(end <-chan struct{}) {
	runtime.LockOSThread()
	<-end
}

func startWorker() chan<- struct{} {
	end := make(chan struct{})
	go work(end)
	return end
}

func main() {
	endAfterArgument()
	var running []chan<- struct{}
	for range workers {
		running = append(running, startWorker())
		time.Sleep(growth / workers)
	}
	for {
		running = append(running, startWorker())
		close(running[0])
		running = running[1:]
		time.Sleep(500 * time.Millisecond)
	}
}
