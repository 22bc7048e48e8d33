//! How long the hot pieces take: `cargo bench --features bench --bench hot`.

#![allow(clippy::unwrap_used, reason = "a bench that cannot be set up measures nothing")]

mod pieces;

use criterion::{Criterion, criterion_group, criterion_main};

use self::pieces::PIECES;

fn hot(criterion: &mut Criterion) {
    for piece in PIECES {
        criterion.bench_function(piece.name, |bencher| bencher.iter_custom(piece.run));
    }
}

criterion_group!(benches, hot);
criterion_main!(benches);
