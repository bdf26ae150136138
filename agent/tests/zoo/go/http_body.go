// Asks an upstream for its status each second. Leaks the connection: the response's body is not closed.
package main

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"time"
)

//go:noinline
func fetchStatus(url string) int {
	response, err := http.Get(url)
	check(err)
	return response.StatusCode
}

//go:noinline
func pollUpstream(url string) {
	for {
		if status := fetchStatus(url); status != http.StatusOK {
			fmt.Println("the upstream says", status)
		}
		time.Sleep(time.Second)
	}
}

func serve(file *os.File) {
	listener, err := net.FileListener(file)
	check(err)
	answer := func(writer http.ResponseWriter, _ *http.Request) { fmt.Fprintln(writer, "fine") }
	check(http.Serve(listener, http.HandlerFunc(answer)))
}

func main() {
	endAfterArgument()
	if _, ok := peerWord(); ok {
		serve(os.NewFile(3, "listener"))
	}
	listener, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	check(err)
	url := "http://" + listener.Addr().String()
	file, err := listener.File()
	check(err)
	startPeer("serve", file)
	check(file.Close())
	check(listener.Close())
	pollUpstream(url)
}
