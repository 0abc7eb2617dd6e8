//! BPF programs by which sockets of a pod in the host's network use the node's addresses, which the guest lacks.
//!
//! [`bind`] lets a client bind one of them as its source, by binding the unspecified address instead. [`connect`] sends
//! TCP connections to 127.0.0.1, if no socket of the guest accepts them, to the address that leads to the node's
//! loopback: a hostPort is reached there although the node has no listener that could be mirrored. [`peer_name`] reverts
//! that for getpeername(2). Each has a variant for IPv4-mapped addresses of IPv6 sockets.
//!
//! Sockets in a network namespace that the pod created are not affected. [`super::bpf`] attaches the programs.

use super::instruction::{
    ANSWER, CONTEXT, COPY, EXIT, IF_EQUAL, Instruction, LOAD, MOVE, instruction,
};
use std::net::Ipv4Addr;

/// Sockets for which a program is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Family {
    /// IPv4 sockets.
    V4,
    /// IPv6 sockets with IPv4-mapped addresses; other addresses are not changed.
    Mapped,
}

impl Family {
    /// Both variants.
    pub(crate) const ALL: [Self; 2] = [Self::V4, Self::Mapped];

    /// Returns the offset of the IPv4 address in the context.
    fn address(self) -> i16 {
        match self {
            Self::V4 => USER_IP4,
            Self::Mapped => USER_IP6 + 12,
        }
    }

    /// Returns the words before the IPv4 address that make an address a mapped one.
    fn prefix(self) -> &'static [u32] {
        match self {
            Self::V4 => &[],
            Self::Mapped => &MAPPED_PREFIX,
        }
    }
}

/// Words of ::ffff:0:0/96, as in memory.
const MAPPED_PREFIX: [u32; 3] = [0, 0, u32::from_ne_bytes([0, 0, 0xff, 0xff])];
/// Offsets in `struct bpf_sock_addr` (linux/bpf.h). Addresses and ports are in network byte order.
const USER_IP4: i16 = 4;
const USER_IP6: i16 = 8;
const USER_PORT: i16 = 24;
const TYPE: i16 = 32;
const SOCKET: i16 = 64;
/// Offset in `struct bpf_sock`.
const SOURCE_IP4: i16 = 24;
/// Opcodes: load a double word; store a register or a constant, as a word or a half; and, add; call; jumps that compare
/// words; jump.
const LOAD_DOUBLE: u8 = 0x79;
const STORE: u8 = 0x63;
const STORE_HALF: u8 = 0x6b;
const STORE_VALUE: u8 = 0x62;
const STORE_HALF_VALUE: u8 = 0x6a;
const AND: u8 = 0x54;
const ADD: u8 = 0x07;
const CALL: u8 = 0x85;
const IF_WORDS_EQUAL: u8 = 0x16;
const UNLESS_WORDS_EQUAL: u8 = 0x56;
const UNLESS_SAME: u8 = 0x5d;
const JUMP: u8 = 0x05;
/// Registers: a value, which calls overwrite; the context and a namespace, which they keep; the end of the stack.
const VALUE: u8 = 2;
const KEPT_CONTEXT: u8 = 6;
const NAMESPACE: u8 = 7;
const STACK_END: u8 = 10;
/// Functions of the kernel.
const SK_LOOKUP_TCP: i32 = 84;
const SK_RELEASE: i32 = 86;
const GET_NETNS_COOKIE: i32 = 122;
/// `BPF_F_CURRENT_NETNS`.
const CURRENT_NAMESPACE: i32 = -1;
/// Place on the stack and size of `struct bpf_sock_tuple` for IPv4: source, destination, and their ports.
const TUPLE: i16 = -16;
const TUPLE_BYTES: i32 = 12;

/// Returns a program for bind(2): one of `addresses` with port 0 becomes the unspecified address.
///
/// With a port it is refused by the kernel as before: a server would listen on all addresses instead of one.
pub(crate) fn bind(family: Family, addresses: &[Ipv4Addr]) -> Vec<Instruction> {
    let mut program = Program::new(family);
    if addresses.is_empty() {
        return program.end();
    }
    program.load(VALUE, USER_PORT);
    program.end_unless_equal(VALUE, 0);
    program.load(VALUE, family.address());
    for (at, address) in addresses.iter().enumerate() {
        // Over the remaining comparisons and the jump after them.
        let over = (addresses.len() - at) as i16;
        program.push(IF_WORDS_EQUAL, VALUE, 0, over, word(*address));
    }
    program.end_if(JUMP, 0, 0, 0);
    program.set_address(family, Ipv4Addr::UNSPECIFIED);
    program.end()
}

/// Returns a program for connect(2): 127.0.0.1 becomes `gateway` unless the guest has a TCP listener for the port, or
/// the socket is bound to the loopback, whose addresses cannot leave the guest.
pub(crate) fn connect(family: Family, gateway: Ipv4Addr) -> Vec<Instruction> {
    let localhost = word(Ipv4Addr::LOCALHOST);
    let mut program = Program::new(family);
    program.load(VALUE, family.address());
    program.end_unless_equal(VALUE, localhost);
    program.load(VALUE, TYPE);
    program.end_unless_equal(VALUE, libc::SOCK_STREAM);
    program.push(LOAD_DOUBLE, VALUE, KEPT_CONTEXT, SOCKET, 0);
    program.push(LOAD, VALUE, VALUE, SOURCE_IP4, 0);
    program.push(AND, VALUE, 0, 0, word(Ipv4Addr::new(255, 0, 0, 0)));
    let loopback = word(Ipv4Addr::new(127, 0, 0, 0));
    program.end_if(IF_WORDS_EQUAL, VALUE, 0, loopback);
    program.push(STORE_VALUE, STACK_END, 0, TUPLE, localhost);
    program.push(STORE_VALUE, STACK_END, 0, TUPLE + 4, localhost);
    program.push(STORE_HALF_VALUE, STACK_END, 0, TUPLE + 8, 0);
    program.load(VALUE, USER_PORT);
    program.push(STORE_HALF, STACK_END, VALUE, TUPLE + 10, 0);
    program.push(COPY, CONTEXT, KEPT_CONTEXT, 0, 0);
    program.push(COPY, 2, STACK_END, 0, 0);
    program.push(ADD, 2, 0, 0, TUPLE.into());
    program.push(MOVE, 3, 0, 0, TUPLE_BYTES);
    program.push(MOVE, 4, 0, 0, CURRENT_NAMESPACE);
    program.push(MOVE, 5, 0, 0, 0);
    program.push(CALL, 0, 0, 0, SK_LOOKUP_TCP);
    // Over the release of a listener.
    program.push(IF_EQUAL, ANSWER, 0, 3, 0);
    program.push(COPY, 1, ANSWER, 0, 0);
    program.push(CALL, 0, 0, 0, SK_RELEASE);
    program.end_if(JUMP, 0, 0, 0);
    program.set_address(family, gateway);
    program.end()
}

/// Returns a program for getpeername(2): `gateway` becomes 127.0.0.1.
pub(crate) fn peer_name(family: Family, gateway: Ipv4Addr) -> Vec<Instruction> {
    let mut program = Program::new(family);
    program.load(VALUE, family.address());
    program.end_unless_equal(VALUE, word(gateway));
    program.set_address(family, Ipv4Addr::LOCALHOST);
    program.end()
}

fn word(address: Ipv4Addr) -> i32 {
    i32::from_ne_bytes(address.octets())
}

/// A program that allows the operation wherever it ends.
struct Program {
    code: Vec<Instruction>,
    /// Jumps to the end.
    ends: Vec<usize>,
}

impl Program {
    /// Begins a program, which ends unless the address has the family's prefix and the socket is in the initial network
    /// namespace.
    fn new(family: Family) -> Self {
        let mut program = Self {
            code: Vec::new(),
            ends: Vec::new(),
        };
        program.push(COPY, KEPT_CONTEXT, CONTEXT, 0, 0);
        for (at, word) in (0..).zip(family.prefix()) {
            program.load(VALUE, USER_IP6 + 4 * at);
            program.end_unless_equal(VALUE, word.cast_signed());
        }
        // Without a context: the initial namespace.
        program.push(MOVE, CONTEXT, 0, 0, 0);
        program.push(CALL, 0, 0, 0, GET_NETNS_COOKIE);
        program.push(COPY, NAMESPACE, ANSWER, 0, 0);
        program.push(COPY, CONTEXT, KEPT_CONTEXT, 0, 0);
        program.push(CALL, 0, 0, 0, GET_NETNS_COOKIE);
        program.end_if(UNLESS_SAME, ANSWER, NAMESPACE, 0);
        program
    }

    fn push(&mut self, code: u8, to: u8, from: u8, offset: i16, value: i32) {
        self.code.push(instruction(code, to, from, offset, value));
    }

    /// Loads a word of the context.
    fn load(&mut self, to: u8, offset: i16) {
        self.push(LOAD, to, KEPT_CONTEXT, offset, 0);
    }

    fn set_address(&mut self, family: Family, address: Ipv4Addr) {
        self.push(MOVE, VALUE, 0, 0, word(address));
        self.push(STORE, KEPT_CONTEXT, VALUE, family.address(), 0);
    }

    fn end_if(&mut self, jump: u8, to: u8, from: u8, value: i32) {
        self.ends.push(self.code.len());
        self.push(jump, to, from, 0, value);
    }

    fn end_unless_equal(&mut self, register: u8, value: i32) {
        self.end_if(UNLESS_WORDS_EQUAL, register, 0, value);
    }

    fn end(mut self) -> Vec<Instruction> {
        let end = self.code.len();
        for at in self.ends.drain(..) {
            self.code[at].offset = (end - at - 1) as i16;
        }
        self.push(MOVE, ANSWER, 0, 0, 1);
        self.push(EXIT, 0, 0, 0, 0);
        self.code
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GATEWAY: Ipv4Addr = Ipv4Addr::new(198, 18, 255, 2);
    const NODE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 200);
    const OTHER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 7);

    /// Value of the context's pointer to the socket.
    const SOCKET_POINTER: u64 = 2;

    /// Context of a TCP socket, as words.
    fn context(family: Family, address: Ipv4Addr, port: u16) -> [u32; 10] {
        let mut context = [0; 10];
        let first = family.address() as usize / 4 - family.prefix().len();
        context[first..][..family.prefix().len()].copy_from_slice(family.prefix());
        context[family.address() as usize / 4] = word(address).cast_unsigned();
        context[USER_PORT as usize / 4] = u16::to_be(port).into();
        context[TYPE as usize / 4] = libc::SOCK_STREAM.cast_unsigned();
        context
    }

    /// The kernel's BPF machine, whose guest listens on one port.
    struct Machine {
        context: [u32; 10],
        /// Address to which the socket is bound.
        source: Ipv4Addr,
        stack: [u8; 16],
        nested: bool,
        listening: u16,
        held: usize,
    }

    impl Machine {
        fn new(context: [u32; 10]) -> Self {
            Self {
                context,
                source: Ipv4Addr::UNSPECIFIED,
                stack: [0; 16],
                nested: false,
                listening: 0,
                held: 0,
            }
        }

        fn call(&mut self, function: i32, registers: &[u64; 11]) -> u64 {
            match function {
                GET_NETNS_COOKIE => u64::from(self.nested && registers[1] != 0),
                SK_LOOKUP_TCP => {
                    assert_eq!(registers[3], self.stack[..12].len() as u64);
                    assert_eq!(self.stack[4..8], [127, 0, 0, 1]);
                    let port = u16::from_be_bytes([self.stack[10], self.stack[11]]);
                    let found = port == self.listening;
                    self.held += usize::from(found);
                    found.into()
                }
                SK_RELEASE => {
                    self.held -= 1;
                    0
                }
                other => panic!("function {other}"),
            }
        }

        /// Runs the program and returns the IPv4 address in the context after it.
        fn run(&mut self, family: Family, program: &[Instruction]) -> Ipv4Addr {
            let mut registers = [0u64; 11];
            registers[usize::from(CONTEXT)] = 1;
            let mut at = 0;
            loop {
                let Instruction {
                    code,
                    registers: pair,
                    offset,
                    value,
                } = program[at];
                at += 1;
                let (to, from) = (usize::from(pair & 15), usize::from(pair >> 4));
                let (left, right) = (registers[to], registers[from]);
                let on_stack = (16 + offset) as usize % 16;
                let same_words = left as u32 == value.cast_unsigned();
                let mut taken = false;
                match code {
                    LOAD if right == SOCKET_POINTER => {
                        assert_eq!(offset, SOURCE_IP4);
                        registers[to] = word(self.source).cast_unsigned().into();
                    }
                    LOAD => registers[to] = self.context[offset as usize / 4].into(),
                    LOAD_DOUBLE => registers[to] = SOCKET_POINTER,
                    AND => registers[to] = (left as u32 & value.cast_unsigned()).into(),
                    MOVE => registers[to] = i64::from(value).cast_unsigned(),
                    COPY => registers[to] = right,
                    ADD => registers[to] = left.wrapping_add_signed(value.into()),
                    STORE => self.context[offset as usize / 4] = right as u32,
                    STORE_HALF => {
                        self.stack[on_stack..][..2].copy_from_slice(&(right as u16).to_ne_bytes());
                    }
                    STORE_VALUE => {
                        self.stack[on_stack..][..4].copy_from_slice(&value.to_ne_bytes());
                    }
                    STORE_HALF_VALUE => self.stack[on_stack..][..2].fill(0),
                    CALL => registers[0] = self.call(value, &registers),
                    IF_EQUAL => taken = left == i64::from(value).cast_unsigned(),
                    IF_WORDS_EQUAL => taken = same_words,
                    UNLESS_WORDS_EQUAL => taken = !same_words,
                    UNLESS_SAME => taken = left != right,
                    JUMP => taken = true,
                    EXIT => break,
                    other => panic!("opcode {other:#x}"),
                }
                if taken {
                    at += offset as usize;
                }
            }
            assert_eq!((registers[0], self.held), (1, 0), "answer, sockets held");
            let address = self.context[family.address() as usize / 4];
            Ipv4Addr::from(address.to_ne_bytes())
        }
    }

    #[test]
    fn bind_of_node_address_without_port_is_unspecified() {
        for family in Family::ALL {
            let program = bind(family, &[OTHER, NODE]);
            for (address, port, bound) in [
                (NODE, 0, Ipv4Addr::UNSPECIFIED),
                (OTHER, 0, Ipv4Addr::UNSPECIFIED),
                (NODE, 80, NODE),
                (GATEWAY, 0, GATEWAY),
            ] {
                let mut machine = Machine::new(context(family, address, port));
                assert_eq!(machine.run(family, &program), bound, "{address}:{port}");
            }
            let mut machine = Machine::new(context(family, NODE, 0));
            assert_eq!(machine.run(family, &bind(family, &[])), NODE);
        }
    }

    #[test]
    fn connect_to_localhost_without_listener_leaves_the_guest() {
        for family in Family::ALL {
            let program = connect(family, GATEWAY);
            for (address, port, reached) in [
                (Ipv4Addr::LOCALHOST, 80, GATEWAY),
                (Ipv4Addr::LOCALHOST, 8080, Ipv4Addr::LOCALHOST),
                (NODE, 80, NODE),
            ] {
                let mut machine = Machine::new(context(family, address, port));
                machine.listening = 8080;
                assert_eq!(machine.run(family, &program), reached, "{address}:{port}");
            }
            let mut bound = Machine::new(context(family, Ipv4Addr::LOCALHOST, 80));
            bound.source = Ipv4Addr::new(127, 0, 0, 5);
            let reached = bound.run(family, &program);
            assert_eq!(reached, Ipv4Addr::LOCALHOST, "bound to the loopback");
            let mut udp = context(family, Ipv4Addr::LOCALHOST, 80);
            udp[TYPE as usize / 4] = libc::SOCK_DGRAM.cast_unsigned();
            let reached = Machine::new(udp).run(family, &program);
            assert_eq!(reached, Ipv4Addr::LOCALHOST, "UDP");
        }
    }

    #[test]
    fn programs_ignore_nested_namespaces_and_plain_ipv6() {
        for family in Family::ALL {
            let mut nested = Machine::new(context(family, Ipv4Addr::LOCALHOST, 80));
            nested.nested = true;
            let reached = nested.run(family, &connect(family, GATEWAY));
            assert_eq!(reached, Ipv4Addr::LOCALHOST);
        }
        let family = Family::Mapped;
        let mut plain = context(family, NODE, 0);
        plain[USER_IP6 as usize / 4] = 1;
        let bound = Machine::new(plain).run(family, &bind(family, &[NODE]));
        assert_eq!(bound, NODE);
    }

    #[test]
    fn peer_name_of_the_gateway_is_localhost() {
        for family in Family::ALL {
            let program = peer_name(family, GATEWAY);
            for (address, answer) in [(GATEWAY, Ipv4Addr::LOCALHOST), (NODE, NODE)] {
                let mut machine = Machine::new(context(family, address, 80));
                assert_eq!(machine.run(family, &program), answer);
            }
        }
    }
}
