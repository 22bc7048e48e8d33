//! How many clients may be amid their TLS handshakes.
//!
//! # Invariants
//!
//! - One address takes half of the places at most: it cannot shut out the
//!   others. Not less than half, since behind a published container port all
//!   clients have one address.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The TLS handshakes of all clients that are under way.
pub(super) struct Handshakes {
    most: usize,
    under_way: Mutex<UnderWay>,
}

#[derive(Default)]
struct UnderWay {
    all: usize,
    by_address: HashMap<IpAddr, usize>,
}

impl Handshakes {
    /// Places for `most` handshakes.
    pub(super) fn new(most: usize) -> Self {
        Self { most, under_way: Mutex::default() }
    }

    /// Takes a place for a client at `address` until what is returned is
    /// dropped; `None` where there is none, or none for that address.
    pub(super) fn begin(&self, address: IpAddr) -> Option<Handshake<'_>> {
        let address = address.to_canonical();
        let mut under_way = self.lock();
        let of_address = under_way.by_address.get(&address).copied().unwrap_or_default();
        if under_way.all >= self.most || of_address >= self.most.div_ceil(2) {
            return None;
        }
        under_way.all += 1;
        under_way.by_address.insert(address, of_address + 1);
        Some(Handshake { handshakes: self, address })
    }

    fn end(&self, address: IpAddr) {
        let mut under_way = self.lock();
        under_way.all -= 1;
        if let Some(of_address) = under_way.by_address.get_mut(&address) {
            *of_address -= 1;
            if *of_address == 0 {
                under_way.by_address.remove(&address);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, UnderWay> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place that is taken; free again when dropped.
pub(super) struct Handshake<'a> {
    handshakes: &'a Handshakes,
    address: IpAddr,
}

impl Drop for Handshake<'_> {
    fn drop(&mut self) {
        self.handshakes.end(self.address);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    /// As many places as `client` gets.
    fn take_all(handshakes: &Handshakes, client: IpAddr) -> Vec<Handshake<'_>> {
        std::iter::from_fn(|| handshakes.begin(client)).collect()
    }

    #[test]
    fn one_address_gets_half_of_the_places_and_the_others_the_rest() {
        for (most, half) in [(1, 1), (4, 2), (5, 3)] {
            let handshakes = Handshakes::new(most);
            let first = take_all(&handshakes, address(1));
            assert_eq!(first.len(), half, "of {most}");
            let others: Vec<_> =
                (2..=9).flat_map(|last| take_all(&handshakes, address(last))).collect();
            assert_eq!(first.len() + others.len(), most, "of {most}");
        }
    }

    #[test]
    fn place_is_free_again_when_its_handshake_is_over() {
        let handshakes = Handshakes::new(4);
        let mut first = take_all(&handshakes, address(1));
        first.pop();
        assert!(handshakes.begin(address(1)).is_some());
        let second = take_all(&handshakes, address(2));
        let third = take_all(&handshakes, address(3));
        assert_eq!((second.len(), third.len()), (2, 1));
        drop((first, second, third));
        assert!(handshakes.lock().by_address.is_empty());
        assert_eq!(handshakes.lock().all, 0);
    }

    #[test]
    fn mapped_address_is_the_same_client() {
        let handshakes = Handshakes::new(4);
        let first = take_all(&handshakes, "::ffff:10.0.0.1".parse().unwrap());
        assert_eq!(first.len(), 2);
        assert!(handshakes.begin(address(1)).is_none());
    }
}
