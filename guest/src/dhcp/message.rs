//! DHCP messages (RFC 2131 and 2132), as far as one exchange with one server needs them. Answers are untrusted.

use std::net::Ipv4Addr;

/// Length of the fixed fields and the magic cookie.
const FIXED_BYTES: usize = 240;
/// Offsets of the fixed fields.
const HARDWARE: usize = 1;
const XID: usize = 4;
const FLAGS: usize = 10;
const YOUR_ADDRESS: usize = 16;
const CLIENT_MAC: usize = 28;
const COOKIE_AT: usize = 236;
const COOKIE: [u8; 4] = [0x63, 0x82, 0x53, 0x63];
/// Operations of the first field.
const REQUEST: u8 = 1;
const REPLY: u8 = 2;
/// Hardware type and address length of Ethernet.
const ETHERNET: [u8; 2] = [1, 6];
/// The client has no address yet and cannot receive an answer that is sent to it.
const BROADCAST: [u8; 2] = [0x80, 0];

const OPTION_PAD: u8 = 0;
const OPTION_MASK: u8 = 1;
const OPTION_ROUTER: u8 = 3;
const OPTION_NAME_SERVERS: u8 = 6;
const OPTION_MTU: u8 = 26;
const OPTION_REQUESTED: u8 = 50;
const OPTION_KIND: u8 = 53;
const OPTION_SERVER: u8 = 54;
const OPTION_PARAMETER_LIST: u8 = 55;
const OPTION_END: u8 = 255;

/// Maximum number of name servers, that of the C library's resolver.
const MAX_NAME_SERVERS: usize = 3;
/// Range of the MTU: the minimum of IPv6, and the maximum of an IPv4 packet.
const MTU: std::ops::RangeInclusive<u32> = 1280..=65_535;

/// Message types of this client and its server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Discover = 1,
    Offer = 2,
    Request = 3,
    Ack = 5,
    Nak = 6,
}

/// Configuration that a server offers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Lease {
    pub address: Ipv4Addr,
    /// Length of the subnet's prefix.
    pub prefix: u8,
    pub gateway: Option<Ipv4Addr>,
    pub name_servers: Vec<Ipv4Addr>,
    /// 0 if the server names none.
    pub mtu: u32,
    /// Server identifier (option 54).
    pub server: Ipv4Addr,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Answer {
    Offer(Lease),
    Ack(Lease),
    Nak,
}

/// Identity of an exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exchange {
    pub xid: [u8; 4],
    pub mac: [u8; 6],
}

impl Exchange {
    /// Returns a DISCOVER, or the REQUEST of an offered lease.
    pub(crate) fn message(&self, offered: Option<&Lease>) -> Vec<u8> {
        let mut message = vec![0; FIXED_BYTES];
        let mut put =
            |at: usize, bytes: &[u8]| message[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &[REQUEST]);
        put(HARDWARE, &ETHERNET);
        put(XID, &self.xid);
        put(FLAGS, &BROADCAST);
        put(CLIENT_MAC, &self.mac);
        put(COOKIE_AT, &COOKIE);
        let mut option = |tag: u8, value: &[u8]| {
            message.push(tag);
            message.extend(u8::try_from(value.len()));
            message.extend(value);
        };
        match offered {
            None => option(OPTION_KIND, &[Kind::Discover as u8]),
            Some(lease) => {
                option(OPTION_KIND, &[Kind::Request as u8]);
                option(OPTION_REQUESTED, &lease.address.octets());
                option(OPTION_SERVER, &lease.server.octets());
            }
        }
        let wanted = [OPTION_MASK, OPTION_ROUTER, OPTION_NAME_SERVERS, OPTION_MTU];
        option(OPTION_PARAMETER_LIST, &wanted);
        message.push(OPTION_END);
        message
    }

    /// Parses an answer; `None` for one that is malformed, or not for this exchange.
    pub(crate) fn answer(&self, bytes: &[u8]) -> Option<Answer> {
        let at = |at: usize, length: usize| bytes.get(at..at + length);
        let ours = at(0, 1)? == [REPLY]
            && at(HARDWARE, 2)? == ETHERNET
            && at(XID, 4)? == self.xid
            && at(CLIENT_MAC, 6)? == self.mac
            && at(COOKIE_AT, 4)? == COOKIE;
        if !ours {
            return None;
        }
        let options = Options(bytes.get(FIXED_BYTES..)?);
        let kind = *options.find(OPTION_KIND)?.first()?;
        if kind == Kind::Nak as u8 {
            return Some(Answer::Nak);
        }
        let lease = Lease {
            address: host(address(at(YOUR_ADDRESS, 4)?)?)?,
            prefix: prefix(address(options.find(OPTION_MASK)?)?)?,
            gateway: options.addresses(OPTION_ROUTER).next(),
            name_servers: options
                .addresses(OPTION_NAME_SERVERS)
                .take(MAX_NAME_SERVERS)
                .collect(),
            mtu: options.find(OPTION_MTU).and_then(mtu).unwrap_or(0),
            server: address(options.find(OPTION_SERVER)?)?,
        };
        match kind {
            kind if kind == Kind::Offer as u8 => Some(Answer::Offer(lease)),
            kind if kind == Kind::Ack as u8 => Some(Answer::Ack(lease)),
            _ => None,
        }
    }
}

/// The options of a message.
struct Options<'a>(&'a [u8]);

impl<'a> Options<'a> {
    /// Returns the value of the first option `tag`.
    fn find(&self, tag: u8) -> Option<&'a [u8]> {
        let mut rest = self.0;
        loop {
            let (found, after) = rest.split_first()?;
            rest = match *found {
                OPTION_PAD => after,
                OPTION_END => return None,
                _ => {
                    let (length, after) = after.split_first()?;
                    let (value, after) = after.split_at_checked((*length).into())?;
                    if *found == tag {
                        return Some(value);
                    }
                    after
                }
            };
        }
    }

    /// Returns the hosts of a list of addresses.
    fn addresses(&self, tag: u8) -> impl Iterator<Item = Ipv4Addr> + use<'a> {
        let list = self.find(tag).unwrap_or_default().chunks_exact(4);
        list.filter_map(|bytes| host(address(bytes)?))
    }
}

fn address(bytes: &[u8]) -> Option<Ipv4Addr> {
    <[u8; 4]>::try_from(bytes).ok().map(Ipv4Addr::from)
}

/// Returns an address that a host can have.
fn host(address: Ipv4Addr) -> Option<Ipv4Addr> {
    let group = address.is_multicast() || address.is_broadcast();
    let usable = !group && !address.is_loopback() && address.octets()[0] != 0;
    usable.then_some(address)
}

fn prefix(mask: Ipv4Addr) -> Option<u8> {
    let bits = u32::from(mask);
    let ones = bits.leading_ones();
    let contiguous = bits.checked_shl(ones).unwrap_or(0) == 0;
    let prefix = u8::try_from(ones).ok()?;
    (contiguous && prefix > 0).then_some(prefix)
}

fn mtu(bytes: &[u8]) -> Option<u32> {
    let mtu = u16::from_be_bytes(bytes.try_into().ok()?).into();
    MTU.contains(&mtu).then_some(mtu)
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXCHANGE: Exchange = Exchange {
        xid: [1, 2, 3, 4],
        mac: [2, 0x62, 0x78, 0, 0, 2],
    };

    /// Returns an answer with these options.
    fn answer(options: &[u8]) -> Vec<u8> {
        let mut bytes = EXCHANGE.message(None);
        bytes.truncate(FIXED_BYTES);
        bytes[0] = REPLY;
        bytes[YOUR_ADDRESS..YOUR_ADDRESS + 4].copy_from_slice(&[198, 18, 254, 15]);
        bytes.extend(options);
        bytes
    }

    /// The options of passt 2025_05_03.
    const PASST: [u8; 33] = [
        53, 1, 5, 1, 4, 255, 255, 255, 0, 3, 4, 198, 18, 254, 2, 6, 4, 10, 0, 0, 53, 26, 2, 255,
        240, 54, 4, 198, 18, 254, 2, 255, 0,
    ];

    fn lease() -> Lease {
        Lease {
            address: Ipv4Addr::new(198, 18, 254, 15),
            prefix: 24,
            gateway: Some(Ipv4Addr::new(198, 18, 254, 2)),
            name_servers: vec![Ipv4Addr::new(10, 0, 0, 53)],
            mtu: 65_520,
            server: Ipv4Addr::new(198, 18, 254, 2),
        }
    }

    #[test]
    fn answer_of_passt_is_a_lease() {
        let bytes = answer(&PASST);
        assert_eq!(EXCHANGE.answer(&bytes), Some(Answer::Ack(lease())));
        let offer = [&[53, 1, 2], &PASST[3..]].concat();
        assert_eq!(
            EXCHANGE.answer(&answer(&offer)),
            Some(Answer::Offer(lease()))
        );
        assert_eq!(EXCHANGE.answer(&answer(&[53, 1, 6])), Some(Answer::Nak));
    }

    #[test]
    fn answer_to_another_exchange_is_ignored() {
        for at in [0, HARDWARE, XID, CLIENT_MAC, COOKIE_AT] {
            let mut bytes = answer(&PASST);
            bytes[at] ^= 0x80;
            assert_eq!(EXCHANGE.answer(&bytes), None, "byte {at}");
        }
        let bytes = answer(&PASST);
        for length in [0, 1, FIXED_BYTES, FIXED_BYTES + 1, FIXED_BYTES + 20] {
            assert_eq!(EXCHANGE.answer(&bytes[..length]), None, "{length} bytes");
        }
    }

    #[test]
    fn answer_with_unusable_values_is_ignored() {
        for mask in [[0, 0, 0, 0], [255, 0, 255, 0]] {
            let mut bytes = answer(&PASST);
            bytes[FIXED_BYTES + 5..FIXED_BYTES + 9].copy_from_slice(&mask);
            assert_eq!(EXCHANGE.answer(&bytes), None, "{mask:?}");
        }
        for own in [[127, 0, 0, 1], [0, 0, 0, 0], [224, 0, 0, 1], [255; 4]] {
            let mut bytes = answer(&PASST);
            bytes[YOUR_ADDRESS..YOUR_ADDRESS + 4].copy_from_slice(&own);
            assert_eq!(EXCHANGE.answer(&bytes), None, "{own:?}");
        }
        // A name server on the guest's loopback, and an MTU below that of IPv6.
        let mut bytes = answer(&PASST);
        bytes[FIXED_BYTES + 17..FIXED_BYTES + 21].copy_from_slice(&[127, 0, 0, 53]);
        bytes[FIXED_BYTES + 23..FIXED_BYTES + 25].copy_from_slice(&[0, 68]);
        let expected = Lease {
            name_servers: Vec::new(),
            mtu: 0,
            ..lease()
        };
        assert_eq!(EXCHANGE.answer(&bytes), Some(Answer::Ack(expected)));
    }

    #[test]
    fn request_names_the_offered_lease() {
        let message = EXCHANGE.message(Some(&lease()));
        let options = Options(&message[FIXED_BYTES..]);
        let found = |tag| options.find(tag).expect("an option");
        assert_eq!(found(OPTION_KIND), [Kind::Request as u8]);
        assert_eq!(found(OPTION_REQUESTED), lease().address.octets());
        assert_eq!(found(OPTION_SERVER), lease().server.octets());
        assert_eq!(message[FLAGS..FLAGS + 2], BROADCAST);
    }

    #[test]
    fn fuzz_answer_is_parsed_or_ignored() {
        boxlite_fuzz::Fuzz::new("dhcp")
            .seed(answer(&PASST))
            .run(|input| {
                if let Some(Answer::Ack(lease) | Answer::Offer(lease)) = EXCHANGE.answer(input) {
                    assert!((1..=32).contains(&lease.prefix));
                    assert!(lease.name_servers.len() <= MAX_NAME_SERVERS);
                    assert!(lease.mtu == 0 || MTU.contains(&lease.mtu));
                }
            });
    }
}
