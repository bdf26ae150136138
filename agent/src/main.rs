fn main() { println!("{}", include_bytes!(env!("PLUMB_EBPF_OBJECT")).len()); }
