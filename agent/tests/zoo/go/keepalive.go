// An HTTP server with twenty clients. They share a pool of connections, which are kept alive.
package main

import (
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"time"
)

const clients = 20

func get(client *http.Client, url string) {
	response, err := client.Get(url)
	check(err)
	_, err = io.Copy(io.Discard, response.Body)
	check(err)
	check(response.Body.Close())
}

func getForEver(client *http.Client, url string) {
	for {
		get(client, url)
		time.Sleep(time.Duration(500+rand.IntN(1000)) * time.Millisecond)
	}
}

func main() {
	endAfterArgument()
	if url, ok := peerWord(); ok {
		client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: clients}}
		for range clients - 1 {
			go getForEver(client, url)
		}
		getForEver(client, url)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	check(err)
	startPeer("http://" + listener.Addr().String())
	answer := func(writer http.ResponseWriter, _ *http.Request) {
		// So long that requests overlap.
		time.Sleep(500 * time.Millisecond)
		fmt.Fprintln(writer, "hello")
	}
	check(http.Serve(listener, http.HandlerFunc(answer)))
}
