//! The buffer compared with a model that keeps every byte.

use super::*;
use proptest::prelude::*;

/// Every byte ever written, with its stream.
#[derive(Default)]
struct Model {
    bytes: Vec<(OutputStream, u8)>,
    base: usize,
    closed: bool,
}

#[derive(Debug, Clone)]
enum Step {
    Write {
        stderr: bool,
        length: usize,
    },
    Ack {
        percent: u8,
    },
    Close,
    /// One of several readers takes a chunk at its own offset.
    Read {
        reader: usize,
    },
    /// A reader resumes at an arbitrary offset.
    Seek {
        reader: usize,
        percent: u8,
    },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (any::<bool>(), prop_oneof![0usize..40, 0usize..MAX_CHUNK_BYTES]).prop_map(|(stderr, length)| Step::Write { stderr, length }),
        2 => (0u8..=110).prop_map(|percent| Step::Ack { percent }),
        1 => Just(Step::Close),
        6 => (0usize..3).prop_map(|reader| Step::Read { reader }),
        2 => (0usize..3, 0u8..=110).prop_map(|(reader, percent)| Step::Seek { reader, percent }),
    ];
    proptest::collection::vec(step, 1..120)
}

fn write(
    buffer: &mut Buffer,
    model: &mut Model,
    stream: OutputStream,
    length: usize,
    next: &mut u8,
) {
    let taken = buffer
        .fill(stream, |tail| {
            let room = tail.capacity() - tail.len();
            assert!(room >= MIN_READ_BYTES, "a read always has room");
            let taken = length.min(room);
            for _ in 0..taken {
                *next = next.wrapping_mul(31).wrapping_add(7);
                tail.push(*next);
                model.bytes.push((stream, *next));
            }
            Ok(taken)
        })
        .unwrap();
    assert!(taken <= length);
}

fn check_read(buffer: &mut Buffer, model: &Model, offset: &mut usize) {
    match buffer.get(*offset as u64) {
        Found::Gone(first) => {
            assert!(*offset < model.base);
            assert_eq!(first as usize, model.base);
        }
        Found::Later => assert!(*offset >= model.bytes.len() && !model.closed),
        Found::End => assert!(*offset >= model.bytes.len() && model.closed),
        Found::Data(chunk) => {
            assert!(*offset >= model.base);
            assert_eq!(chunk.offset as usize, *offset);
            assert!(!chunk.data.is_empty() && chunk.data.len() <= MAX_CHUNK_BYTES);
            for (index, byte) in chunk.data.iter().enumerate() {
                assert_eq!(model.bytes[*offset + index], (chunk.stream, *byte));
            }
            *offset += chunk.data.len();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn readers_get_written_bytes_from_any_offset(steps in steps()) {
        let mut buffer = Buffer::default();
        let mut model = Model::default();
        let mut readers = [0usize; 3];
        let mut next = 0u8;
        for step in steps {
            match step {
                Step::Write { stderr, length } => {
                    let stream = if stderr { OutputStream::Stderr } else { OutputStream::Stdout };
                    if buffer.has_room() && !model.closed {
                        write(&mut buffer, &mut model, stream, length, &mut next);
                    }
                }
                Step::Ack { percent } => {
                    let offset = model.bytes.len() * usize::from(percent) / 100;
                    buffer.ack(offset as u64);
                    model.base = model.base.max(offset.min(model.bytes.len()));
                }
                Step::Close => {
                    buffer.close();
                    model.closed = true;
                }
                Step::Read { reader } => check_read(&mut buffer, &model, &mut readers[reader]),
                Step::Seek { reader, percent } => readers[reader] = model.bytes.len() * usize::from(percent) / 100,
            }
            prop_assert_eq!(buffer.end() as usize, model.bytes.len());
            let kept: usize = buffer.sealed.iter().map(|chunk| chunk.data.len()).sum::<usize>() + buffer.tail.len();
            prop_assert!(kept <= CAPACITY_BYTES);
            prop_assert_eq!(
                buffer.charged,
                buffer.sealed.iter().map(|chunk| chunk.data.len() + SEGMENT_OVERHEAD_BYTES).sum::<usize>()
            );
        }
    }
}

#[test]
fn buffer_of_single_bytes_stays_within_bounds() {
    let mut buffer = Buffer::default();
    let mut model = Model::default();
    let (mut next, mut reader) = (0, 0);
    while buffer.has_room() {
        write(&mut buffer, &mut model, OutputStream::Stdout, 1, &mut next);
        check_read(&mut buffer, &model, &mut reader);
    }
    assert!(buffer.sealed.len() <= CAPACITY_BYTES / SEGMENT_OVERHEAD_BYTES);
    buffer.ack(reader as u64);
    assert!(buffer.has_room());
    assert_eq!(buffer.charged, 0);
}

#[tokio::test]
async fn output_full_stops_reading_until_ack() {
    let (reader, writer) = nix::unistd::pipe().unwrap();
    let total: usize = 5 << 20;
    let producer = std::thread::spawn(move || {
        use std::io::Write;
        let mut file = std::fs::File::from(writer);
        let block: Vec<u8> = (0..=255).collect();
        for _ in 0..total / 256 {
            file.write_all(&block).unwrap();
        }
    });
    let output = std::sync::Arc::new(Output::default());
    let source = crate::descriptor::AsyncDescriptor::new(reader).unwrap();
    let pump = tokio::spawn({
        let output = std::sync::Arc::clone(&output);
        async move {
            loop {
                output.wait_for_room().await;
                match source
                    .read_with(|fd| output.fill(OutputStream::Stdout, fd))
                    .await
                    .unwrap()
                {
                    Filled::End => break,
                    _ => assert!(output.end() - output.lock().base <= CAPACITY_BYTES as u64),
                }
            }
            output.close();
        }
    });
    let mut offset = 0;
    loop {
        match output.read(offset).await {
            Found::Data(chunk) => {
                for (index, byte) in chunk.data.iter().enumerate() {
                    assert_eq!(*byte, ((offset as usize + index) & 0xff) as u8);
                }
                offset += chunk.data.len() as u64;
                if offset % 7 == 0 || !output.has_room() {
                    output.ack(offset);
                }
            }
            Found::End => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(offset as usize, total);
    producer.join().unwrap();
    pump.await.unwrap();
}

#[test]
fn buffer_keeps_acked_bytes_for_observers() {
    let (mut buffer, mut model, mut next) = (Buffer::default(), Model::default(), 0);
    let fill = |buffer: &mut Buffer, model: &mut Model, next: &mut u8| {
        write(buffer, model, OutputStream::Stdout, MAX_CHUNK_BYTES, next);
        buffer.ack(buffer.end());
    };
    fill(&mut buffer, &mut model, &mut next);
    assert!(matches!(buffer.get(0), Found::Gone(_)));
    buffer.observed(1);
    let from = buffer.end() as usize;
    fill(&mut buffer, &mut model, &mut next);
    let mut offset = from;
    check_read(&mut buffer, &model, &mut offset);
    assert!(
        offset > from,
        "an acknowledged byte is available to the observer"
    );
    // It holds nothing back: acknowledged output is freed if needed, and only as much as is needed.
    for _ in 0..100 {
        assert!(buffer.has_room());
        fill(&mut buffer, &mut model, &mut next);
    }
    assert!(matches!(buffer.get(from as u64), Found::Gone(first) if first < buffer.end()));
    assert!(buffer.end() - buffer.base > (CAPACITY_BYTES / 2) as u64);
    buffer.observed(-1);
    assert_eq!(buffer.base, buffer.end());
    // Without an acknowledgement an observer frees nothing.
    buffer.observed(1);
    while buffer.has_room() {
        write(
            &mut buffer,
            &mut model,
            OutputStream::Stdout,
            MAX_CHUNK_BYTES,
            &mut next,
        );
    }
    let base = buffer.base;
    assert!(!buffer.has_room() && buffer.base == base);
}
