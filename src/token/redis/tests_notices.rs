//! The notices against a real `redis-server`.

use std::sync::Arc;

use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::tests::{BOUND, Server, settings};
use super::*;

/// The channel that the settings of the tests give.
const CHANNEL: &str = "{chitai_gorod_token}:events";

/// Follows the notices in the background, until dropped.
pub(super) struct Follower {
    pub(super) store: Arc<RedisStore>,
    signals: watch::Receiver<u64>,
    task: JoinHandle<()>,
}

impl Follower {
    pub(super) fn of(settings: RedisSettings) -> Self {
        let store = Arc::new(RedisStore::new(settings).unwrap());
        let signals = store.notices();
        let followed = Arc::clone(&store);
        let task = tokio::spawn(async move { followed.follow_notices().await });
        Self { store, signals, task }
    }

    pub(super) async fn signal_within(&mut self, limit: Duration) {
        timeout(limit, self.signals.changed()).await.expect("a signal").unwrap();
    }

    fn has_signal(&self) -> bool {
        self.signals.has_changed().unwrap()
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Waits until the server counts this many followers.
async fn followers(server: &Server, expected: u64) {
    let counted = async {
        loop {
            let (_, count): (String, u64) = server.command(&["PUBSUB", "NUMSUB", CHANNEL]).await;
            if count == expected {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(pause::LONGEST + BOUND, counted).await.expect("so many followers");
}

async fn publish(server: &Server, channel: &str) -> u64 {
    server.command(&["PUBLISH", channel, r#"{"event":"committed","epoch":1}"#]).await
}

#[tokio::test]
async fn the_subscription_and_each_notice_give_a_signal() {
    let server = Server::start(&[]).await;
    let mut follower = Follower::of(server.settings());
    follower.signal_within(BOUND).await;
    for _ in 0..3 {
        assert_eq!(publish(&server, CHANNEL).await, 1);
        follower.signal_within(BOUND).await;
    }
    assert_eq!(publish(&server, "{another}:events").await, 0);
    assert!(!follower.has_signal());
}

#[tokio::test]
async fn a_lost_subscription_is_made_again_and_signals() {
    let mut server = Server::start(&[]).await;
    let mut follower = Follower::of(server.settings());
    follower.signal_within(BOUND).await;
    let _: u64 = server.command(&["CLIENT", "KILL", "TYPE", "pubsub"]).await;
    follower.signal_within(pause::LONGEST + BOUND).await;
    server.kill();
    server.restart().await;
    follower.signal_within(pause::LONGEST + BOUND).await;
    assert_eq!(publish(&server, CHANNEL).await, 1);
    follower.signal_within(BOUND).await;
}

#[tokio::test]
async fn a_server_that_is_down_at_first_is_followed_when_it_comes() {
    let mut server = Server::start(&[]).await;
    server.kill();
    let mut follower = Follower::of(server.settings());
    follower.store.ping().await.unwrap_err();
    server.restart().await;
    follower.signal_within(pause::LONGEST + BOUND).await;
    // The pause of the other connection has ended with that.
    follower.store.ping().await.unwrap();
}

#[tokio::test]
async fn a_silent_server_is_left_and_followed_again() {
    let server = Server::start(&[]).await;
    let mut follower = Follower::of(server.settings());
    follower.signal_within(BOUND).await;
    // No sign of life within the time after which one is asked for, and one second.
    server.signal("-STOP");
    let asked = notices::SILENCE + link::STEP_LIMIT + Duration::from_millis(500);
    tokio::time::sleep(asked).await;
    server.signal("-CONT");
    // Its old connection ends as soon as the server reads on.
    follower.signal_within(pause::LONGEST + BOUND).await;
    followers(&server, 1).await;
    assert_eq!(publish(&server, CHANNEL).await, 1);
    follower.signal_within(BOUND).await;
}

#[tokio::test]
async fn a_quiet_server_is_not_left() {
    let server = Server::start(&[]).await;
    let mut follower = Follower::of(server.settings());
    follower.signal_within(BOUND).await;
    tokio::time::sleep(notices::SILENCE + link::STEP_LIMIT * 2).await;
    assert!(!follower.has_signal(), "the subscription was made anew");
    let stats: String = server.command(&["INFO", "commandstats"]).await;
    assert!(stats.contains("cmdstat_subscribe:calls=1,"), "{stats}");
}

#[tokio::test]
async fn a_user_without_the_channel_is_followed_once_it_has_it() {
    let server = Server::start(&[]).await;
    let _: () = server.command(&["ACL", "SETUSER", "u", "on", ">p", "~*", "+@all"]).await;
    let follower = Follower::of(settings(&format!("redis://u:p@127.0.0.1:{}", server.port)));
    let refused = follower.store.link.follow(CHANNEL).await.err();
    assert!(matches!(&refused, Some(StoreError::RedisRefused { code }) if code == "NOPERM"));
    // Nor may it tell anybody: what it does counts all the same.
    let request = Request { owner: Owner::random(), wish: Wish::Needed, known: Vec::new() };
    let entrance = follower.store.enter(&request, 0).await.unwrap();
    assert_eq!(entrance.turn, Standing::Granted { epoch: 1 });
    let (published, now) = (super::tests::published(true), Timestamp(1_000_000));
    let lease = Lease { owner: request.owner, epoch: 1 };
    let committed = follower.store.commit(&published, Some(&lease), None, now).await.unwrap();
    assert_eq!(committed, Commit::Committed);
    let mut follower = follower;
    let _: () = server.command(&["ACL", "SETUSER", "u", &format!("&{CHANNEL}")]).await;
    follower.signal_within(pause::LONGEST + BOUND).await;
}
